"""Scores a Causal2Vec checkpoint, or any sentence-transformers model, on MTEB as the paper does (section 4.1, B.3).

    python eval_mteb.py --model . --tasks mini --output results/mine
    python eval_mteb.py --model . --tasks all --data_dir DATA --output results/mine          # without a network
    python eval_mteb.py --output runs/scores --export results/mine                           # what is worth keeping
    python eval_mteb.py --compare results/mine results/other paper:Mistral-7B --output results/compared
    torchrun --nproc_per_node 8 eval_mteb.py --model . --tasks mteb56 --dtype bf16 --output results/mine

Invariants: an output folder holds one model in one setting; a finished result is never computed again, and never reused
for another model, instruction, text or setting.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.encoder import Examples, Instructions, MTEBEncoder, Noise, start_processes
from evaluation.identity import DTYPES, load_backend, locate, model_meta
from evaluation.inputs import analyze, print_prompts
from evaluation.report import export, write_comparison
from evaluation.run import run


ROOT = Path(__file__).resolve().parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\nInvariants")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to do (default: score --model on --tasks into --output)")
    what.add_argument("--print_prompts", action="store_true", help="print the exact text per task and side, and stop")
    what.add_argument("--prefetch", metavar="DIR", help="fill DIR with the data of --tasks from the Hub, and stop")
    what.add_argument(
        "--export",
        metavar="DIR",
        help="write the finished results of --output to DIR in a form to keep: summary.md, summary.json with settings and "
        "records, and mteb's own JSON of each task; and stop",
    )
    what.add_argument(
        "--compare",
        nargs="+",
        metavar="RESULT",
        help="compare output folders and published models (paper:NAME); writes tables and PNGs to --output, and stops",
    )
    what.add_argument("--readme", metavar="FILE", help="with --compare: also replace the marked table in this file")
    what.add_argument(
        "--analyze",
        action="store_true",
        help="measure sequence lengths, with --icl also with examples (Figure 6), and the norms of the two states "
        "(Figure 5) on some texts of each task; writes numbers and PNGs to --output, and stops",
    )
    what.add_argument("--analyze_texts", type=int, default=256, help="texts per task for --analyze (default: 256)")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        help="folder or Hub id of a Causal2Vec checkpoint or of a sentence-transformers model, which is scored with its "
        "own stored prompts and no instructions; or package:NAME for a model folder inside an installed Python package",
    )
    model.add_argument("--revision", help="commit, tag or branch on the Hub (default: main)")
    model.add_argument("--name", help="what results call the model (default: its Hub id or its folder's name)")
    model.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model's weights (default: fp32)")
    model.add_argument("--device", help="such as cuda:0 or cpu (default: an accelerator if there is one)")
    model.add_argument("--attn_implementation", help="such as sdpa or flash_attention_2 (default: transformers')")
    model.add_argument(
        "--pooling",
        choices=("contextual_eos", "last_token"),
        default="contextual_eos",
        help="last_token: the checkpoint's decoder alone, without encoder and Contextual token (default: the embedding "
        "that the checkpoint was trained for)",
    )
    model.add_argument("--max_length", type=int, help="longest decoder sequence in tokens (default: the checkpoint's)")
    model.add_argument(
        "--unnormalized",
        action="store_true",
        help="leave a Causal2Vec checkpoint's vectors at their length; cosine scores stay, classification and "
        "clustering change",
    )

    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="task names, categories (Retrieval, Reranking, Clustering, PairClassification, Classification, STS, "
        "Summarization), mteb56, mini (the paper's 30), or all (every folder of --data_dir)",
    )
    tasks.add_argument(
        "--data_dir", metavar="DIR", help="read tasks from folders in DIR, one per task, and never use the network"
    )
    tasks.add_argument(
        "--instructions",
        metavar="FILE",
        default=str(ROOT / "instructions.json"),
        help='JSON: task name -> instruction, or {"query": ..., "document": ...} (default: instructions.json here)',
    )
    tasks.add_argument(
        "--icl", metavar="DIR", help='in-context examples: DIR/<task>.json with a list of {"query", "response"}'
    )
    tasks.add_argument(
        "--noise",
        metavar="FILE",
        nargs="?",
        const=str(ROOT / "evaluation" / "noise.txt"),
        help="also score with a line of FILE, chosen by text and seed, appended to every text before both encoder and "
        "decoder read it (Table 3; default: evaluation/noise.txt here)",
    )
    tasks.add_argument("--noise_seed", type=int, default=0, help="for the choice of lines (default: 0)")

    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", help="where results go; run again to resume")
    run.add_argument("--batch_size", type=int, default=32, help="texts per forward pass (default: 32)")
    run.add_argument("--cache_dir", metavar="DIR", help="keep vectors there, so that an interrupted task goes on")
    run.add_argument("--overwrite", action="store_true", help="score these tasks again, whatever is there")

    args = parser.parse_args(argv)
    needed = ["output"] if args.compare or args.export else ["tasks"] if args.prefetch else ["model", "tasks", "output"]
    if args.print_prompts:
        needed = ["model", "tasks"]
    missing = [f"--{name}" for name in needed if not getattr(args, name)]
    if missing:
        parser.error(f"needs {', '.join(missing)}")
    if args.noise and (args.print_prompts or args.analyze):
        parser.error("--noise only changes what is scored; leave it out with --print_prompts and --analyze")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        print(write_comparison(args.compare, args.output, args.readme))
        return
    if args.export:
        export(args.output, args.export)
        return
    if args.data_dir:  # before anything that reads them is imported
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

    from evaluation.tasks import prefetch, select_tasks

    if args.prefetch:
        prefetch(select_tasks(args.tasks), args.prefetch)
        return
    tasks = select_tasks(args.tasks, args.data_dir)
    encoder = load_encoder(args, tasks)
    if args.print_prompts:
        print_prompts(encoder, tasks)
    elif args.analyze:
        analyze(encoder, tasks, args.output, args.analyze_texts)
    else:
        noisy = [encoder.with_noise(Noise.read(args.noise, args.noise_seed))] if args.noise else []
        failed = run(tasks, [encoder, *noisy], args.output, args.overwrite)
        if failed:
            sys.exit(
                f"{len(failed)} of {len(tasks)} tasks failed: {', '.join(failed)}. Run again to repeat these alone."
            )


def load_encoder(args: argparse.Namespace, tasks: Sequence) -> MTEBEncoder:
    """
    The wrapper around `--model` for these tasks.

    Raises:
        ValueError: a task has no instruction, or an option does not apply to this kind of model.
        FileNotFoundError: the model or the examples are missing.
    """
    location = locate(args.model, args.revision, args.name)
    only_ours = {
        "--icl": args.icl,
        "--pooling last_token": args.pooling == "last_token",
        "--max_length": args.max_length,
        "--unnormalized": args.unnormalized,
        "--analyze": args.analyze,
    }
    if not location.is_causal2vec and any(only_ours.values()):
        wrong = [option for option, given in only_ours.items() if given]
        raise ValueError(f"{', '.join(wrong)}: only for Causal2Vec checkpoints, and {args.model} is none.")
    instructions = Instructions.read(args.instructions, tasks) if location.is_causal2vec else None
    examples = Examples.read(args.icl, tasks)

    device = start_processes() or args.device
    backend = load_backend(
        location, args.dtype, device, args.attn_implementation, args.pooling, args.max_length, not args.unnormalized
    )
    label = args.name or location.name.removeprefix("local/")
    settings = {
        "label": f"{label}, last token" if args.pooling == "last_token" else label,
        "model": location.name,
        "revision": location.revision,
        "dtype": args.dtype,
        "pooling": args.pooling if location.is_causal2vec else None,
        "normalized": not args.unnormalized if location.is_causal2vec else None,
        "max_length": backend.max_tokens,
        "icl": True if args.icl else None,
    }
    return MTEBEncoder(
        backend,
        model_meta(location, backend),
        settings,
        instructions or backend.stored_prompt,
        examples,
        args.batch_size,
        Path(args.cache_dir) if args.cache_dir else None,
    )


if __name__ == "__main__":
    main()
