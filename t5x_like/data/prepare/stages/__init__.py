"""What is done to every document: each stage is a configuration and a pure function of the document."""
