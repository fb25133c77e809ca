"""The command line: everything between the words typed and a checked `Config`.

    launch.py       the front door: `qat`, `python -m qat`, a clone's launch.py
    main.py         the whole way in a dozen lines
    arguments.py    the words typed, as flags and overrides Hydra reads
    checkpoints.py  `checkpoint=<path>` and `checkpoint=SR-007`, which qat/names.py understands
    compose.py      overrides to a `Config`; Hydra's errors as one sentence each
    overrides.py    keys and options that do not exist
    checks/         values and combinations that cannot work, a module a section
    folders.py      where a run or sweep lands
    sweeping.py     -m and sweep.resume: the plan of a sweep, and its end
    job.py          what happens inside a job
    schema.py       the keys, read off `qat.config`
    helping.py      the --help pages
    completion.py   what a shell offers at the end of a line
    reference.py    docs/CONFIG.md

Nothing here imports torch, so that help and errors answer at once.
"""
