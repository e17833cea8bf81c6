"""python -m tasks.overrides; see tasks.shared.operations.params.overrides."""

from tasks.shared.operations.params.overrides import main

if __name__ == "__main__":
    main()
