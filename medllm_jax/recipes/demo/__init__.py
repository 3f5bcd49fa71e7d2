"""The miniature world of `medllm demo`: a small Japanese medical corpus, its exams and its tokenizer."""
