"""The configuration: its model, the YAML file, environment variables and the data directory.

`config` is the one place where a setting is declared. Nothing here acts on a setting.
"""
