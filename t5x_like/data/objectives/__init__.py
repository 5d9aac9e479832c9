"""What a model learns from text: each objective turns rows of text into the features that a model reads and predicts.

An objective is a configuration; built with a tokenizer it is a pure function of rows of text and their random keys.
"""
