"""Figures of "The Devil in Linear Transformer" and settings of the authors' scripts, to stand beside ours as theirs.

A figure that we do not know is left out.
"""

TITLE = "[The Devil in Linear Transformer](https://arxiv.org/abs/2210.10340) (EMNLP 2022)"

# Relative standard deviation of the gradients over training.
TABLE_2 = {"1+elu": 0.58, "Performer": 0.47, "Vanilla": 0.25, "NormAttention": 0.20}
# Autoregressive language models on WikiText-103: perplexities, and parameters in millions.
TABLE_4: dict[str, dict[str, float]] = {
    "validation": {"Vanilla": 29.63, "1+elu": 32.63, "Performer": 75.29, "T1": 29.89, "T2": 29.57},
    "test": {"Vanilla": 31.01, "T1": 31.35, "T2": 31.01},
    "parameters": {"Vanilla": 156.00, "T1": 155.99, "T2": 155.99},
}
# Fine-tuning on GLUE: accuracies in percent, F1 of MRPC and Matthews correlation of CoLA.
TABLE_5: dict[str, dict[str, float]] = {
    "mnli": {"Vanilla": 79.37, "1+elu": 74.87, "Performer": 58.85, "T1": 79.06, "T2": 77.28},
    "mnli mismatched": {"Vanilla": 79.07, "T1": 79.93, "T2": 78.53},
    "qnli": {"Vanilla": 87.79, "1+elu": 82.59, "Performer": 63.44, "T1": 87.00, "T2": 85.39},
    "qqp": {"Vanilla": 88.04, "1+elu": 86.90, "Performer": 79.10, "T1": 88.61, "T2": 88.56},
    "sst2": {"Vanilla": 90.25, "1+elu": 87.27, "Performer": 81.42, "T1": 91.17, "T2": 90.71},
    "mrpc": {"Vanilla": 88.35, "1+elu": 83.03, "Performer": 82.11, "T1": 84.50, "T2": 85.06},
    "cola": {"Vanilla": 38.63, "Performer": 19.41, "T1": 45.38, "T2": 45.90},
    "mean": {"Vanilla": 78.79, "T1": 79.38, "T2": 78.78},
    "parameters": {"Vanilla": 124.70, "T1": 124.67, "T2": 124.67},
}
# Long-Range Arena: accuracies in percent.
TABLE_6 = {
    "listops": {"Transformer": 38.37, "Performer": 38.02, "cosFormer": 36.50, "T1": 41.03, "T2": 41.60},
    "image": {"Transformer": 40.57, "Performer": 41.43, "cosFormer": 51.23, "T1": 51.60, "T2": 49.60},
}
# Training steps per second on an A6000, by length.
TABLE_7 = {
    "Transformer": {1024: 15.34},
    "Performer": {1024: 28.41, 3072: 12.02, 5120: 9.06},
    "T2": {1024: 29.41, 3072: 12.95, 5120: 10.16},
}

# The authors' scripts train_alm.sh and train_blm.sh (github.com/OpenNLPLab/Transnormer), by the class that they train.
TRAINING = {
    "TransNormerForCausalLM": {
        "data": "WikiText-103, vocabulary of words",
        "tokens per update": "65,536 (128 sequences of 512)",
        "updates": "100,000",
        "optimizer": "Adam, betas (0.9, 0.98), epsilon 1e-8, weight decay 0.01, no clipping",
        "learning rate": "5e-4, inverse square root, 8,000 updates of warm-up from 1e-7",
        "dropout": "0.1, in attention 0",
        "precision": "float32",
    },
    "TransNormerForMaskedLM": {
        "data": "WikiText-103 (raw), byte-level BPE of GPT-2",
        "sequences per update": "512 of at most 512 tokens",
        "updates": "50,000",
        "optimizer": "Adam, betas (0.9, 0.98), epsilon 1e-6, weight decay 0.01, no clipping",
        "learning rate": "5e-4, polynomial decay, 3,000 updates of warm-up",
        "dropout": "0.1, in attention 0.1",
        "masking": "15 % of the tokens",
    },
}
