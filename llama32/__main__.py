"""`python -m llama32`: the command line."""

from llama32.cli.main import main

if __name__ == "__main__":
    main()
