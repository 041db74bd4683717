"""The launcher: it checks, starts, watches and stops the processes of a run."""
