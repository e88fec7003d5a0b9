"""Which share of AdamW's budget reaches AdamW's best held-out loss: Shampoo's family, Muon and AdamW on small models.

Two architectures (Llama-like; GPT-2-like with learned positions and tied head) with 4 and 15 million parameters learn
real text with new weights. Every point is a run of its own schedule (warm-up, then a straight line to zero), at
budgets from 0.25 to 1.0 of AdamW's steps, and every contestant at its own best rate for each budget: the search goes
on while the best rate lies at the edge. Seeds decide weights and the order of the data. The share of AdamW's budget is
interpolated between these runs, in steps and in CPU seconds.

    python -m benchmarks.convergence                      # everything: days on two cores
    python -m benchmarks.convergence --cells llama-4m --seeds 0 --contestants adamw muon kl --budgets 0.35 0.4 1
    python -m benchmarks.convergence --queue queue.jsonl  # what a file asks for, see below
    python -m benchmarks.convergence --report             # table and picture of what is there
    python -m benchmarks.convergence --quick              # ten minutes: is the default as good as it was?

Text. `--text` names a folder of text files. Without it the documentation of the kernel is used if it is installed
(`apt-get install linux-doc`: 21 MB of prose in /usr/share/doc/linux-doc-*/html/_sources; or `apt-get download
linux-doc-6.1`, `dpkg -x` and `--text`), else the sources of Python's library. One document in 20 is held out. A BPE
tokenizer is trained on the others; tokens are cached in `--cache`. Runs of different texts never mix.

Results. `--output` is a file with one JSON line for each finished run: all that determines it under "run", the commit
of the code that ran, losses, and CPU seconds of model and optimizer. Finished runs are never repeated, so every command
can be stopped and started again; a run that was under way starts over. A failed or killed run counts as finished; to
repeat one, delete its line. "run" does not hold the commit. If code changes what the same options do, give the
experiment another "version".

Queue. One JSON object for each line, the most urgent first; "#" begins a comment. The file is read again after each
run, so lines may be added, moved or deleted at any time; a wrong line is reported and passed over. With `--wait` the
loop waits for new lines when all is done. Fields, of which only "contestant" is needed:

    {"contestant": "kl",             a name in recipes.py
     "cells": ["llama-4m"], "seeds": [0], "budgets": [0.35, 1.0],
     "rates": [3e-3, 5e-3, 8e-3],    without it the recipe's; "best": the best known rate of the nearest budget, which
                                     may be of another seed; nothing runs until there is one
     "walk": true,                   goes on to neighbouring rates while the best is at the edge; false: these only
     "options": {"eps": 1e-10},      on top of the recipe's
     "name": "KL, small eps",        in the table
     "version": "2", "tree": "/path/of/a/checkout",  code of another checkout, by its .venv if it has one
     "steps": 300, "batch": 8, "length": 128}        AdamW's whole budget, and the tokens of a step

A recipe of options that only the other checkout knows needs nothing here: "options" are passed on as they are.
"""
