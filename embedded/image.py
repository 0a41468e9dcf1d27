"""A root filesystem for containers and images of it, made of busybox alone: there is no image registry to ask."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

#: What images call the machine's architecture.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def make_rootfs(directory: Path) -> Path:
    """Make a root filesystem in ``directory``, with every command that the machine's static busybox has."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise FileNotFoundError("busybox is not installed")
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var"):
        (directory / name).mkdir(parents=True)
    shutil.copy(busybox, directory / "bin" / "busybox")
    applets = subprocess.run([busybox, "--list"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (directory / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (directory / "etc" / "resolv.conf").touch()
    return directory


def make_archive(archive: Path, rootfs: Path, images: Mapping[str, Sequence[str]]) -> Path:
    """Write images, each a name with its command, as `docker save` does: all have ``rootfs`` as their only layer."""
    with tarfile.open(archive, "w") as out:
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as files:
            files.add(rootfs, arcname=".")
        _add(out, "layer.tar", layer.getvalue())
        diff_id = f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"
        manifest = []
        for name, command in images.items():
            config = json.dumps(
                {
                    "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
                    "os": "linux",
                    "config": {"Cmd": command, "Env": ["PATH=/bin"]},
                    "rootfs": {"type": "layers", "diff_ids": [diff_id]},
                }
            ).encode()
            file = f"{hashlib.sha256(config).hexdigest()}.json"
            _add(out, file, config)
            manifest.append({"Config": file, "RepoTags": [name], "Layers": ["layer.tar"]})
        _add(out, "manifest.json", json.dumps(manifest).encode())
    return archive


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    file = tarfile.TarInfo(name)
    file.size = len(content)
    archive.addfile(file, io.BytesIO(content))
