"""Changes from outside: modules that take the place of the model's leaves, never a second model."""
