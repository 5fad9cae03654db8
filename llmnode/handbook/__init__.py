"""The handbook model: its corpus, the recipe that trains it, and the exam that it must pass.

    corpus/*.toml  facts.py     what it should know, with many ways to ask for it
    speech.toml    phrasing.py  more ways to ask: other openings, synonyms, typing mistakes
    chatter.toml   chatter.py   simple English around it, and what is none of its business
    lessons.py                  conversations made of these, without end, under a seed
    tokenizer.py   network.py   byte-level BPE; a Llama of 2.6 million parameters
    train.py       export.py    from nothing to a GGUF
    exam.toml  exam.py  grade.py  what it is asked in the end, and the rule by which an answer is right

Nothing outside this package imports it. Training needs the extra `train`; the exam runs on llmnode's own engine.
"""
