"""Tables and figures of all records: python report.py --help. It is the same as: lowrank-lab report."""

from lowrank_lab.commands.report import main

if __name__ == "__main__":
    main()
