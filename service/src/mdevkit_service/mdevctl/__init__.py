"""``mdevkit-mdevctl``: takes mdevctl's place. Commands, options, output, files, scripts and exit codes as mdevctl 1.4 has them.

`program` is the command, `options` its command line, `manager` what is done, `listing` what is printed, `store` where definitions
are; `commands` gives the same to ``mdevkit define`` and its kind. All of it is a client of the service, and runs in the user's
process with his rights.
"""
