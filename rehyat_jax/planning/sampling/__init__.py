"""Plans of sampling: the programs of its parts, their memory and time, what would fit, and the command."""
