"""What a pre-trained language model learns and forgets in a short fine-tuning: Shampoo's family, Muon and AdamW.

SmolLM2-135M-Instruct learns one of two tasks, all of its weights or LoRA adapters. Every run has its own schedule
(warm-up, then a straight line to zero) and is evaluated four times on its way. Runs compute in bfloat16 by autocast;
weights are float32. Seeds decide the order of the data and the adapters.

    python -m benchmarks.finetuning --queue queue.jsonl   # what a file asks for, see below
    python -m benchmarks.finetuning --report              # table and picture of what is there

Tasks. "dictionary": translations of English words into German (FreeDict), where only the answer counts. "handbook":
text of a new domain (The Debian Administrator's Handbook). A share of translations and of pages is held out. Forgetting
is measured on the Jargon Lexicon, prose of which the model knows a good deal, by two numbers: the loss, and the
divergence from the predictions of the model as it was ("drift", in nats a token; never negative). The loss may
fall at first, because a model tuned to chats gets used to plain prose; the divergence shows each change.

Data. The texts are Debian packages: dict-freedict-eng-deu, debian-handbook and dict-jargon. `--data` names the folder
where they are unpacked (`dpkg -x`), "/" if they are installed. Without it `apt-get download` fetches them once into
`--cache`, next to the model.

Results. As in benchmarks.convergence: a JSON line for each finished run, which is never repeated; a run that was
stopped starts over; a failed run counts as finished until its line is deleted.

Queue. One JSON object for each line, the most urgent first; "#" begins a comment. The file is read again after each
run. Fields, of which only "contestant" is needed:

    {"contestant": "shampoo",        a name in recipes.py
     "tasks": ["handbook"], "methods": ["full"],     or "lora8", "lora32": adapters of that rank
     "seeds": [0], "rates": [1e-4, 2e-4],            without it the recipe's
     "options": {"grafting": "adam"}, on top of the recipe's
     "name": "Adam's length",         in the table
     "version": "2", "tree": "/path/of/a/checkout",  code of another checkout, by its .venv if it has one
     "steps": 40, "tokens": 512}     of a step, padding included
"""
