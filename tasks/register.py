"""python -m tasks.register; see tasks.model.register."""

from tasks.model.register import main

if __name__ == "__main__":
    main()
