"""Run one job or a grid: python run.py --help. It is the same as: lowrank-lab run."""

from lowrank_lab.commands.run import main

if __name__ == "__main__":
    main()
