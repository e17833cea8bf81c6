"""python -m tasks.convert; see tasks.model.convert."""

from tasks.model.convert import main

if __name__ == "__main__":
    main()
