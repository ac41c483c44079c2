"""`shannon doctor`: what would keep a deployment from starting or serving well, and what to do about it.

    examination.py   all checks, in order
    finding.py       a check's result; case.py: its input
    installation.py  Python, packages, vLLM's build; gpus.py: drivers and devices
    checkpoint.py    a model's files; memory.py: what it takes; engine_settings.py: what vLLM says of its settings
    place.py         volumes, shared memory, open files, the port
    deployment.py    the configuration, its keys and tools
    store_health.py  Valkey or Redis; replicas.py: engines elsewhere
    report.py        findings for people and machines

Looks and asks only, and prints no secret. What it changes is the layout's version in a store that is empty.
"""
