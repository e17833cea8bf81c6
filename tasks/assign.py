"""python -m tasks.assign; see tasks.model.assign."""

from tasks.model.assign import main

if __name__ == "__main__":
    main()
