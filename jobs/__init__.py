"""The command line: parse, load the config, call one pipeline function, print, exit code."""
