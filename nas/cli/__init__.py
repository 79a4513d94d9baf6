"""The command ``nas``: one file per sub-command, each of which parses, calls the library and prints."""
