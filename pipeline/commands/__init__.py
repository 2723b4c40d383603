"""One module a group of commands, in the order of ``pipeline --help``: parse, call, print.

::

    features.py   extract · extract-clip · extract-teacher
    students.py   train-student · evaluate · baselines
    studies.py    ablate · ablate-status · tour
    findings.py   diagnose · report · compare
    machine.py    synth · doctor
    cache.py      cache ls · cache verify · cache repair · cache gc · cache inspect · cache copy · cache export
    options.py    the options that commands share, and what their values mean

What a command does is not here: each function names the module that it calls. Nothing heavy is imported before a
command runs, so that ``--help`` answers at once.
"""
