"""The command `wsolnb`: run the notebooks in batch, look at parameters and metrics, refresh stored outputs."""

from __future__ import annotations

from typing import Annotated

import typer

from wsolnb.errors import WsolnbError

# Everything else is imported by the command that needs it, so that `--help` answers at once.

Profile = Annotated[str, typer.Option(help="a folder of params/: mini, smoke, pets, ...")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="goes to every notebook that declares NAME"),
]
Outputs = Annotated[str, typer.Option(help="folder of the run folders; a relative path starts at the repository")]


class _Group(typer.core.TyperGroup):
    """Shows the errors of the package as a message, not as a traceback."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except WsolnbError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    help="Weakly supervised localization, reproduced in notebooks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # `rich` alone takes longer to import than all else that `--help` needs
)


@app.command()
def reproduce(
    profile: Profile = "mini",
    parameter: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NOTEBOOK", help="this notebook and what it needs; can be repeated")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="run also what is up to date, and train anew")] = False,
    outputs: Outputs = "outputs",
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="notebooks at once, each with its share of the cores")] = 1,
    start: Annotated[
        list[str] | None, typer.Option("--from", metavar="NOTEBOOK", help="run this again, and all that depends on it")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going/--stop-at-failure", "-k/-S", help="go on with what needs no failed notebook")
    ] = True,
) -> None:
    """Run the notebooks of a profile that are out of date, and print the metrics.

    Relative paths in parameters start at the root of the repository. Ends with 0 when every notebook is done, with 1
    when one failed, with 2 when a parameter is wrong (then nothing was run), with 130 when interrupted (Ctrl-C,
    SIGTERM or SIGHUP).
    """
    try:
        from wsolnb.notebook import pipeline

        what = (profile, parameter or (), only or (), force, outputs, jobs, start or (), keep_going)
        summary = pipeline.reproduce(*what)
    except KeyboardInterrupt:
        typer.echo("Interrupted; no notebook was running. The same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(130 if summary["interrupted"] else 0 if summary["complete"] else 1)


@app.command()
def plan(
    profile: Profile = "mini",
    parameter: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NOTEBOOK", help="as of `reproduce`")] = None,
    outputs: Outputs = "outputs",
    device: Annotated[
        str, typer.Option(help="what hours are estimated for: cpu, a100, ...; default a100 if the profile is for a GPU")
    ] = "",
) -> None:
    """Tell what `reproduce` would run, what it will cost, and what is missing: data, files, weights, packages, disk.

    Hours, memory and disk are estimates, with their assumptions below them. Nothing is run or downloaded. Ends with 0
    when nothing is missing, with 1 when something is.
    """
    from wsolnb.notebook import costs, pipeline

    steps = pipeline.plan(profile, parameter or (), only or (), outputs)
    for step in steps:
        typer.echo("  after ".join(filter(None, (step.notebook, ", ".join(step.needs)))))
        for name, value in step.parameters.items():
            typer.echo(f"    {name}: {value}")
    device = device or ("a100" if pipeline.made_for_gpu(profile) else "cpu")
    rows, remarks = costs.report(pipeline.resolved(steps), device)
    _show(rows)
    for line in remarks:
        typer.echo(line)
    found = pipeline.missing(steps, profile, outputs)
    for one in found:
        typer.echo(f"{'missing' if one.fatal else 'note'}: {one.notebook}: {one.text}")
        if one.remedy:
            typer.echo(f"    {one.remedy}")
    if not found:
        typer.echo("nothing is missing")
    raise typer.Exit(int(any(one.fatal for one in found)))


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="a sweep of params/sweeps/, or a YAML file")],
    outputs: Outputs = "outputs",
    workers: Annotated[int, typer.Option(min=1, help="runs at once on this machine, each with one thread")] = 1,
    scheduler: Annotated[str, typer.Option(metavar="ADDRESS", help="of Dask, whose workers make the runs")] = "",
    slurm: Annotated[bool, typer.Option("--slurm", help="start the workers with Slurm, as the sweep says")] = False,
    part: Annotated[str, typer.Option(metavar="K/N", help="make part K of N; `wsolnb merge` joins the parts")] = "1/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs and estimate their hours only")] = False,
    device: Annotated[str, typer.Option(help="what --dry-run estimates hours for: cpu, a100, ...")] = "cpu",
) -> None:
    """Run notebooks over a grid of parameters and seeds: one table with means, paired 95 % intervals, a picture.

    What is done is not done again, so the same command goes on after an interruption. Ends with 0 when all runs are
    made, with 1 when one failed (the others are made), with 2 when an entry is wrong (then nothing was run), with 130
    when interrupted.
    """
    from wsolnb.notebook import sweeps

    if dry_run:
        for line in sweeps.plan(name, outputs, part, device):
            typer.echo(line)
        return
    summary = sweeps.run(name, outputs, scheduler, workers, slurm, part)
    raise typer.Exit(130 if summary["interrupted"] else 1 if summary["failed"] else 0)


@app.command()
def merge(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="folders of one sweep, of several machines")],
    out: Annotated[str, typer.Option(metavar="DIR", help="the folder that gets the results of all, and their table")],
) -> None:
    """Join the results of a sweep that several machines have made. Relative paths start at the repository.

    The same run with equal numbers counts once. With other numbers it is an error, unless code or versions differ: then
    no mean is taken over both.
    """
    from wsolnb.notebook import sweeps

    sweeps.merge(folders, out)


@app.command()
def status(profile: Profile = "mini", parameter: Overrides = None, outputs: Outputs = "outputs") -> None:
    """Tell what `reproduce` would run or train again, and why. Ends with 0 when all is fresh, with 1 when not."""
    from wsolnb.notebook import pipeline

    notebooks, artefacts = pipeline.status(profile, parameter or (), outputs)
    for what, found in {"notebooks": notebooks, "artefacts": artefacts}.items():
        typer.echo(f"{what}: {sum(not why for why in found.values())} of {len(found)} fresh")
        for name, why in found.items():
            typer.echo(f"  {name}: {f'stale, {why}' if why else 'fresh'}")
    raise typer.Exit(int(any(notebooks.values())))


@app.command()
def parameters(notebook: str) -> None:
    """List the parameters of a notebook: name, type, default, meaning."""
    from wsolnb.notebook import params

    rows = [(p.name, p.type, repr(p.default), p.help) for p in params.notebook_parameters(notebook).values()]
    _show([("name", "type", "default", "meaning"), *rows])


def _show(rows: list[tuple[str, ...]]) -> None:
    """Print a table, the first row its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


# ----------------------------------------------------------------------------------------------------------- data sets

data = typer.Typer(
    help="Get data sets, check copies of them, look at them.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data, name="data")

DataName = Annotated[str, typer.Argument(metavar="NAME", help="a data set: `wsolnb data list` names them")]
DataRoot = Annotated[str, typer.Option(help="folder of all data sets; a relative path starts at the repository")]
DataFolder = Annotated[
    str, typer.Argument(metavar="ROOT", help="the data set's folder, or that of all; a relative path as for --root")
]


@data.command("list")
def list_data(root: DataRoot = "data") -> None:
    """List the data sets: size of the download, licence, the profile that runs on it, whether it is in the root."""
    from wsolnb.data.downloads import catalogue
    from wsolnb.files import resolve

    rows = [("name", "data set", "download", "licence", "profile", "there")]
    for name, record in catalogue().items():
        there = "yes" if (resolve(root) / record.folder).is_dir() else "no"
        rows.append((name, record.title, record.size, record.licence, record.profile or "-", there))
    _show(rows)
    typer.echo(f"Folders are looked for in {resolve(root)}.")


@data.command("download")
def download_data(name: DataName, root: DataRoot = "data") -> None:
    """Fetch and unpack a data set from its official addresses.

    Files are checked against their published hashes. What was interrupted goes on when the command is given again.
    Read the licence and the terms, which are shown first: who downloads accepts them.
    """
    from wsolnb.data.downloads import download
    from wsolnb.files import resolve

    try:
        download(name, resolve(root), typer.echo)
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command goes on", err=True)
        raise typer.Exit(130) from None


@data.command("check")
def check_data(
    name: DataName,
    root: DataFolder,
    deep: Annotated[bool, typer.Option("--deep", help="decode every image")] = False,
) -> None:
    """Say what is missing, damaged or inconsistent in a copy, whole or a part. Ends with 1 when anything is wrong."""
    from wsolnb.data.check import check
    from wsolnb.files import resolve

    report = check(name, resolve(root), deep)
    typer.echo(str(report))
    raise typer.Exit(int(bool(report.problems)))


@data.command("sample")
def sample_data(
    name: DataName,
    root: DataFolder,
    out: Annotated[str, typer.Option(metavar="FILE.png", help="a relative path starts at the repository")],
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="how many images")] = 16,
    split: Annotated[str, typer.Option(help="default: the first that `check` names")] = "",
    seed: Annotated[int, typer.Option(help="draws other images")] = 0,
) -> None:
    """Draw a contact sheet of random images with their boxes, masks and class names."""
    import numpy as np

    from wsolnb.data.downloads import get_record
    from wsolnb.errors import check_choice
    from wsolnb.files import resolve, write_atomically
    from wsolnb.notebook import viz

    record = get_record(name)
    split = split or next(iter(record.splits))
    check_choice(f"{name} has no split", split, record.splits)
    dataset = record.open(record.locate(resolve(root)), split)
    drawn = np.random.default_rng(seed).choice(len(dataset), min(number, len(dataset)), replace=False)
    viz.set_style()
    figure = viz.sample_sheet([dataset[index] for index in drawn], dataset.class_names)
    typer.echo(write_atomically(resolve(out), viz.png(figure)))


@app.command()
def metrics(profile: Profile = "mini", outputs: Outputs = "outputs") -> None:
    """Print the metrics of a run folder again."""
    from wsolnb.notebook import pipeline
    from wsolnb.notebook.runs import RunError

    folder = pipeline.run_folder(profile, outputs)
    if not any((folder / "metrics").glob("*.json")):
        raise RunError(f"{folder} holds no metrics", f"run `wsolnb reproduce --profile {profile}` first")
    pipeline.show_tables(pipeline.tables(folder))


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="a run folder, as outputs/mini; without one, the stored notebooks")
    ] = "",
    out: Annotated[str, typer.Option(metavar="DIR", help="where to; default RUN/site, or outputs/site")] = "",
) -> None:
    """Build the book: every notebook as a page, with search and provenance. It is read without network or server.

    Ends with 0, with 1 when a link leads nowhere or a picture has no alternative text (the book is written), with 2
    when nothing could be built.
    """
    from wsolnb.files import resolve
    from wsolnb.notebook import site

    folder = resolve(out or f"{run or 'outputs'}/site")
    pages = site.build(folder, resolve(run) if run else None)
    found = site.problems(folder)
    for problem in found:
        typer.echo(f"warning: {problem}", err=True)
    typer.echo(f"{len(pages)} pages: open {folder / pages[0]}")
    raise typer.Exit(int(bool(found)))


@app.command()
def localize(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER...", help="image files, or folders of them")],
    out: Annotated[str, typer.Option(metavar="DIR", help="folder that everything is written to")],
    method: Annotated[
        str, typer.Option(help="cam, layercam, grad_cam or lpcam of any classifier; of a checkpoint its own method")
    ] = "",
    backbone: Annotated[str, typer.Option(help="network of timm, or a short name; default efficientnet_lite0")] = "",
    checkpoint: Annotated[
        str, typer.Option(metavar="FILE", help="weights trained here (last.safetensors), or of the --backbone")
    ] = "",
    class_: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME", help="what is looked for; can be repeated")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="0 to 1, share of a map's maximum; default 0.3, lpcam 0.5")
    ] = None,
    names: Annotated[str, typer.Option(metavar="FILE", help="names of a checkpoint's classes, one per line")] = "",
    layer: Annotated[str, typer.Option(help="of grad_cam: a layer of the backbone; the last one's is cam")] = "",
    size: Annotated[int | None, typer.Option(min=32, help="side of the square that the network sees")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="write to a folder that is not empty")] = False,
) -> None:
    """Name what photographs show and where: maps, boxes (COCO, Pascal VOC), masks and a contact sheet.

    Without --class the most likely class of each image is looked for. LPCAM's prototypes come from the images given.

    DIR gets maps/*.npz (score maps in [0, 1]), masks/*.png (indices of classes.txt in VOC's colours), voc/*.xml,
    coco/instances.json and results.json, and contact_sheet.png.

    Ends with 0, with 1 when an image was left out (the others are written), with 2 when nothing could be done.
    """
    from pathlib import Path

    from wsolnb.notebook import localize as command

    options = {"method": method, "backbone": backbone, "checkpoint": checkpoint, "layer": layer, "names": names}
    options |= {"threshold": threshold, "image_size": size, "device": device, "overwrite": overwrite}
    left_out = command.run(
        images, Path(out), classes=class_ or (), **options, say=typer.echo, warn=lambda text: typer.echo(text, err=True)
    )
    typer.echo(f"written to {out}" + (f"; {left_out} left out, see above" if left_out else ""))
    raise typer.Exit(int(left_out > 0))


@app.command()
def refresh(notebooks: list[str]) -> None:
    """Execute notebooks in place with their defaults, and store the outputs."""
    from wsolnb.notebook import pipeline

    for notebook in notebooks:
        typer.echo(f"{notebook}  ", nl=False)
        typer.echo(f"{pipeline.refresh(notebook):.1f} s")
