"""``python -m shallowflow`` is ``sfplan``: what torchrun and accelerate can start."""

from shallowflow.cli import main

if __name__ == "__main__":
    main()
