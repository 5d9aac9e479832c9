"""Property tests: the same examples in every run, and no deadlines, which a busy machine would miss."""

import hypothesis

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")
