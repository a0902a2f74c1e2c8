"""Checkpoint files: reading both layouts, saving in the Hub's layout, downloads."""
