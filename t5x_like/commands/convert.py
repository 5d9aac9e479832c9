"""`t5x_like convert`: imports a model from Hugging Face's format, or exports one."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from t5x_like.checkpoints.run_directory import RunDirectory
from t5x_like.commands import cli
from t5x_like.config import config_text
from t5x_like.errors import UserError
from t5x_like.files import new_directory
from t5x_like.huggingface.convert import export_model, import_model, num_parameters
from t5x_like.huggingface.directory import CONFIG
from t5x_like.sharding.mesh import MeshConfig, place


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(command, argv, define_flags)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("from", None, "Directory to read: a MODEL_DIR, or one of Hugging Face.", flag_values=values)
    flags.DEFINE_string("to", None, "Directory to write, which must not exist yet.", flag_values=values)
    flags.DEFINE_integer(
        "vocab_size", None, "Import: pad the vocabulary to this size. Default: none.", flag_values=values
    )
    flags.DEFINE_string("step", "latest", "Export: a step, `latest`, or `best` on validation.", flag_values=values)
    flags.DEFINE_float(
        "max_file_gb", 5.0, "Export: largest size of a file, in gigabytes.", lower_bound=0, flag_values=values
    )


def command(values: flags.FlagValues) -> None:
    """Imports a Hugging Face directory as a MODEL_DIR, or exports a MODEL_DIR as a Hugging Face directory."""
    source, target = (values[name].value for name in ("from", "to"))
    if source is None or target is None:
        raise UserError("convert needs --from=DIRECTORY to read and --to=DIRECTORY to write.")
    if values.gin_file or values.gin_bindings:
        raise UserError("convert takes no gin files and no bindings: the directory it reads holds the configuration.")
    directory, target = RunDirectory(source), Path(target)
    directory.pull()
    is_run = directory.checkpoints.is_dir()
    if not is_run and not (directory.path / CONFIG).is_file():
        raise UserError(
            f"--from={source} holds no model: neither checkpoints/ of a run nor the {CONFIG} of a Hugging Face model."
        )
    for name in ("vocab_size",) if is_run else ("step", "max_file_gb"):
        if values[name].present:
            raise UserError(f"--{name} has no effect when {'exporting' if is_run else 'importing'}: leave it out.")
    if target.exists() or target.is_symlink():
        raise UserError(f"--to={target} exists: choose a directory that does not.")
    # All devices share each parameter: no device, nor the host, has to hold the whole model.
    placement = place(MeshConfig(data=1, fsdp=-1))
    try:
        with new_directory(target) as work:
            if is_run:
                report = export_model(directory, work, placement, values.step, int(values.max_file_gb * 1e9))
            else:
                family, saved = import_model(directory.path, work, placement, values.vocab_size)
                name, size = family.model_type, f"{num_parameters(saved.params):,} parameters"
                comment = f"# A {name} model imported from {directory.path.name}; include this file in a run file."
                RunDirectory(work).model_config.write_text(f"{comment}\n{config_text('MODEL', saved.config)}")
                report = f"{name}, {size} ({saved.dtype} in the files), checkpoint of step 0"
    except OSError as error:
        raise UserError(f"--to={target} could not be made: {error}.") from error
    print(f"{target}: {report}")
