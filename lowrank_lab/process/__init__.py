"""The running process: its progress, how it is stopped, its memory, and the machine that it runs on."""
