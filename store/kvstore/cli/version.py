"""``kvstore version``: of this command and of the master."""

from kvstore_proto import admin_pb2

import kvstore
from kvstore.cli.connection import connect
from kvstore.cli.options import DEFAULT_MASTER, JsonOption, MasterOption
from kvstore.cli.output import console, print_json
from kvstore.errors import UnavailableError


def version(master: MasterOption = DEFAULT_MASTER, as_json: JsonOption = False) -> None:
    """Show the versions of this command and, if one answers, of the master.

    [bold]Examples[/bold]
      [cyan]kvstore version[/cyan]
      [cyan]kvstore version --json[/cyan]
    """
    answer: admin_pb2.VersionResponse | None = None
    with connect(master) as admin:
        try:
            answer = admin.call("Version", admin_pb2.VersionRequest())
        except UnavailableError:
            answer = None
    if as_json:
        found = None
        if answer is not None:
            found = {"version": answer.version, "protocol_version": answer.protocol_version}
        print_json({"version": kvstore.__version__, "master": found})
        return
    out = console()
    out.print(f"kvstore {kvstore.__version__}")
    if answer is None:
        out.print(f"master: none answers at {master}")
    else:
        out.print(f"master  {answer.version} (protocol {answer.protocol_version}) at {master}")
