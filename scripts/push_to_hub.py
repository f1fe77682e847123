#!/usr/bin/env python
"""Publishes a trained model on the Hugging Face Hub: weights, configuration, code, tokenizer, card, results.

    python scripts/push_to_hub.py --model_dir outputs/sst2 --repo_id user/transnormer-sst2 --dry_run
    python scripts/push_to_hub.py --model_dir outputs/sst2 --repo_id user/transnormer-sst2 --private

    python scripts/push_to_hub.py --refresh_code --repo_id user/transnormer-sst2  # this package's code for old weights
    python scripts/push_to_hub.py --refresh_code --model_dir outputs/sst2         # the same in a folder

The token is that of `hf auth login` or HF_TOKEN: as an argument, everybody on the machine could read it.
"""

import argparse
import json
import sys

from transnormer_hf.hub.push import HubError, plan_upload, push_to_hub
from transnormer_hf.hub.refresh import Refreshment, refresh_folder, refresh_repository


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Publish a trained TransNormer on the Hugging Face Hub.")
    parser.add_argument("--model_dir", help="folder that save_pretrained or the Trainer wrote")
    parser.add_argument("--repo_id", help="user/name; created where it does not exist")
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument("--revision", help="branch to push to, created where it does not exist; default: main")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request against main")
    parser.add_argument("--dry_run", action="store_true", help="check everything, list the files, send nothing")
    parser.add_argument(
        "--refresh_code",
        action="store_true",
        help="replace the code in --repo_id, or in the folder --model_dir, by this package's; the weights stay",
    )
    options = parser.parse_args(arguments)
    if options.refresh_code:
        if (options.model_dir is None) == (options.repo_id is None):
            parser.error("--refresh_code takes --repo_id (a repository of the Hub) or --model_dir (a folder).")
        if options.private or options.dry_run:
            parser.error("--refresh_code changes what is there already: leave --private and --dry_run out.")
        if options.model_dir is not None and (options.revision or options.create_pr):
            parser.error("--revision and --create_pr are for a repository: give --repo_id in place of --model_dir.")
    elif options.model_dir is None or options.repo_id is None:
        parser.error("--model_dir and --repo_id are both needed to push.")
    try:
        if options.refresh_code:
            report(
                refresh_folder(options.model_dir)
                if options.repo_id is None
                else refresh_repository(options.repo_id, revision=options.revision, create_pr=options.create_pr)
            )
            return
        if options.dry_run:
            plan = plan_upload(
                options.model_dir, options.repo_id, revision=options.revision, create_pr=options.create_pr
            )
            for name, size in plan.files.items():
                print(f"{size:>15,}  {name}")
            print(f"{plan.size:>15,}  bytes in {len(plan.files)} files")
            for name, reason in plan.left_out.items():
                print(f"{'left out':>15}  {name} ({reason})")
            print(f"\nMetadata of the card:\n{json.dumps(plan.metadata, indent=2)}")
            print(f"Loads by remote code. Nothing was sent to {options.repo_id}.")
            return
        done = push_to_hub(
            options.model_dir,
            options.repo_id,
            private=options.private or None,
            revision=options.revision,
            create_pr=options.create_pr,
        )
    except (ValueError, HubError) as error:
        sys.exit(f"error: {error}")
    if done.pull_request is not None:
        print(f"Proposed: {done.pull_request}")
    else:
        print(f"Published: {done.commit.commit_url}\nTag: {done.tag}")
    print(f'Load it with revision="{done.commit.oid}", trust_remote_code=True.')


def report(done: Refreshment) -> None:
    for name in done.written:
        print(f"written  {name}")
    for name in done.removed:
        print(f"removed  {name}")
    if not (done.written or done.removed):
        print("The code is that of this package already: nothing was changed.")
    elif done.commit is not None:
        print(f"One commit: {done.commit.pr_url or done.commit.commit_url}" + f"\nTag: {done.tag}" * bool(done.tag))


if __name__ == "__main__":
    main()
