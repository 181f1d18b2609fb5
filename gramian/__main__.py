"""`python -m gramian`: the command line."""

from gramian.cli import main

if __name__ == "__main__":
    main()
