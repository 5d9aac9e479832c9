"""From raw pages to a tokenised corpus: reading, extraction, cleaning, deduplication, tokens in shards, a report.

`run.prepare` is the whole; a pass is a function of one unit of work (`work.Unit`) that writes files, so that an
engine (`engine.LocalEngine`, `beam.BeamEngine`) only has to map it, in any order, on any machine.
"""
