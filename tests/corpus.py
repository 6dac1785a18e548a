"""What tiny tokenizers are trained on."""

CORPUS = [
    "You are a highly skilled and impartial evaluator tasked with comparing two responses.",
    "<think>The image shows 7.\nResponse 1 says 7, which is right.\nResponse 2 says 3, which is wrong.\n"
    "Response 1 is better.</think><answer>1</answer>",
    "Which digit is shown? 0 1 2 3 4 5 6 7 8 9 system user assistant You are a helpful assistant.",
] * 4
