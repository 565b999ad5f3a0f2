"""`pingjia data tokenizer FILE...`: learn a Chinese vocabulary, or add to that of a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pingjia.cli.console import console, megabytes
from pingjia.errors import UserError

if TYPE_CHECKING:
    from pingjia.chat.extend import BpeBase
    from pingjia.data.bpe import Corpus, Fit

FILES_HELP = "Data files to learn from, or samples:NAME."
DEFAULT_SIZE, DEFAULT_ADD = 8000, 2000


def tokenizer(
    files: Annotated[list[str], typer.Argument(help=FILES_HELP, metavar="FILE...")],
    out: Annotated[Path, typer.Option("--out", help="Directory to create.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Extend this model's vocabulary and write a complete model.")
    ] = None,
    add: Annotated[
        int | None, typer.Option("--add", help=f"With --base: how many tokens ({DEFAULT_ADD} by default).", min=1)
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", help=f"Tokens in all ({DEFAULT_SIZE} by default, without --base).", min=300),
    ] = None,
    min_frequency: Annotated[int, typer.Option(help="How often a token must occur at least.", min=2)] = 5,
    eval_files: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out file to measure on; else every tenth row.")
    ] = None,
) -> None:
    """Train a Chinese BPE on the questions and answers of FILEs, or extend a base model by new tokens."""
    from pingjia.data.bpe import Corpus

    corpus = Corpus(files, eval_files or ())
    if base is not None:
        _extend(corpus, out, base, add, vocab_size, min_frequency)
    elif add is not None:
        raise UserError("--add is for --base MODEL: tokens are added to a vocabulary; without a base give --vocab-size")
    else:
        _train(corpus, out, vocab_size or DEFAULT_SIZE, min_frequency)


def _train(corpus: Corpus, out: Path, vocab_size: int, min_frequency: int) -> None:
    from pingjia.data.bpe import measure, train_fresh
    from pingjia.data.bpe_files import whole_directory

    with whole_directory(out) as folder:
        trained = train_fresh(corpus.learnt, vocab_size, min_frequency, console.print)
        trained.save(folder)
    _print_shortfall(trained.vocab_size, vocab_size, min_frequency)
    console.print(f"{trained.vocab_size:,} tokens in {out}")
    _print_fit("corpus", measure(corpus.learnt(), trained))
    _print_rows(corpus)
    _print_fit("held out", measure(corpus.unseen(), trained))


def _extend(corpus: Corpus, out: Path, base: str, add: int | None, vocab_size: int | None, min_frequency: int) -> None:
    from pingjia import chat
    from pingjia.chat.extend import BpeBase
    from pingjia.data import bpe
    from pingjia.data.bpe_files import Account, whole_directory, write_notes
    from pingjia.models.vocabulary import AddedRows, extend_model

    vocabulary = BpeBase(chat.load_tokenizer(base), base)
    wanted = _num_tokens(vocabulary, add, vocab_size)
    with whole_directory(out) as folder:
        extension = bpe.extend(vocabulary, corpus.learnt, wanted, min_frequency, console.print)
        seen = bpe.compare(corpus.learnt(), vocabulary.tokenizer, extension)
        _print_rows(corpus)
        rows, bad_rows = corpus.num_rows, corpus.num_bad_rows
        unseen = bpe.compare(corpus.unseen(), vocabulary.tokenizer, extension)
        account = Account(
            base, tuple(corpus.files), tuple(corpus.held_out), min_frequency, rows, bad_rows, seen, unseen
        )
        pieces = [token.pieces for token in extension.tokens]
        grown = extend_model(base, folder, AddedRows(vocabulary.first_new, pieces, extension.digest))
        extension.tokenizer.save(folder)
        write_notes(folder, out, extension, account, is_tied=grown.is_tied)
    _print_shortfall(len(pieces), wanted, min_frequency)
    for name, fit in account.fits:
        _print_fit(name, fit)
    console.print(
        f"{len(pieces):,} tokens added to {base}: {grown.num_rows:,} rows in its embedding "
        f"(before {grown.num_rows_before:,}); {megabytes(grown.stored_bytes)} in {out}"
    )
    console.print(
        "the new embeddings are means of the old pieces and must be trained: "
        f"pingjia train {out / 'recipe.yaml'}  (train_new_tokens: true)"
    )


def _num_tokens(base: BpeBase, add: int | None, vocab_size: int | None) -> int:
    """How many tokens to add. UserError for both numbers at once, or a size that the base has already."""
    if add is not None and vocab_size is not None:
        raise UserError(f"--add {add} and --vocab-size {vocab_size} both say how many tokens; give one of them")
    if vocab_size is not None and vocab_size <= base.first_new:
        raise UserError(
            f"--vocab-size {vocab_size}: the base has {base.first_new:,} tokens already; give more, or --add"
        )
    return vocab_size - base.first_new if vocab_size is not None else add or DEFAULT_ADD


def _print_shortfall(found: int, wanted: int, min_frequency: int) -> None:
    if found < wanted:
        console.print(
            f"the corpus gives {found:,} tokens, not {wanted:,}: nothing more occurs {min_frequency} times "
            "(--min-frequency)"
        )


def _print_rows(corpus: Corpus) -> None:
    passed = f"; {corpus.num_bad_rows} bad rows passed over (see `pingjia data check`)" if corpus.num_bad_rows else ""
    console.print(f"learnt from {corpus.num_rows:,} rows{passed}")


def _print_fit(name: str, fit: Fit) -> None:
    if not fit.num_texts:
        console.print(f"{name}: no rows to measure on")
        return
    before = f"{fit.before:.2f} -> " if fit.before else ""
    fewer = f", {1 - fit.num_after / fit.num_before:.0%} fewer tokens" if fit.num_before else ""
    console.print(f"{name}: {before}{fit.after:.2f} characters per token{fewer} ({fit.num_characters:,} characters)")
