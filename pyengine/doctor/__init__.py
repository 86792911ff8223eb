"""Does every op work on this machine? Checked one by one, and remembered where one does not.

`shapes` says what a pair calls its ops with, the ops' own modules make such calls, `device` runs
them, `checks` judges, `worker` does that in a process of its own, which `runner` starts and
watches. `quarantine` remembers what failed, `first_use` is what a model asks before it runs,
`report` what is shown.
"""
