"""python -m tasks.params check | show [ENCODER] | folder PATH | apply RECIPE | migrate [FILE …]."""

from tasks.shared.operations.params.command import main

if __name__ == "__main__":
    main()
