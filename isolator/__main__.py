"""`python3 -m isolator` is `isolator`."""

from isolator.cli.main import main

if __name__ == "__main__":
    main()
