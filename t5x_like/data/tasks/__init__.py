"""Tasks with examples: records, what is made of each, and how answers are scored."""
