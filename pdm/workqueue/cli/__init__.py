"""The command ``pdm``. Each module holds a few commands; `main` imports only the module of the requested command."""
