"""The command ``pdm``. Each module holds a few commands; `main` loads the one that is asked for, and nothing else."""
