#!/usr/bin/env python
"""Make a TransNormer of a pretrained BERT, RoBERTa, DistilBERT, ELECTRA, GPT-2 or Llama, in minutes and without labels.

    python scripts/linearize.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_file sentences.txt --max_minutes 5 --output_dir outputs/minilm-linear
    python scripts/linearize.py --model_name_or_path gpt2 --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-103-raw-v1 --softmax_layers 2,5,8,11 --max_seq_length 512 \\
        --max_steps 2000 --joint_steps 1000 --output_dir outputs/gpt2-linear

The weights are copied, and each attention learns to give what the one that it replaces gives; `--joint_steps` then
trains all layers together. The folder is that of any TransNormer: fine-tune it with `run_glue.py --model_name_or_path`.
The same command goes on with a run that was interrupted.
"""

from transnormer_hf.linearize.command import linearize

if __name__ == "__main__":
    linearize()
