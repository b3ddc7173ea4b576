"""Objects on the bus, seen by a client: what a call goes through, what is told to whom, and what a bug cannot do."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from dbus_next.signature import Variant

from sendense_restored import errors
from sendense_restored.daemon import exports as exports_module
from sendense_restored.daemon.bus import Bus
from sendense_restored.daemon.exported import Exported, Fd, Signal, describe, method, prop, unpack
from sendense_restored.daemon.exports import Exports
from tests.bus.peer import Message, MessageFlag, MessageType, Peer, error_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from sendense_restored.daemon.bus import Call, Reply

ROOT = "/com/sendense/Restore1"
MANAGER = "com.sendense.Restore1.Manager"
CATALOG = "com.sendense.Restore1.Catalog"
MOUNT = "com.sendense.Restore1.Mount"
STANDARD = "org.freedesktop.DBus."


class Object(Exported):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.asked: list[tuple[str, dict[str, Any], bool]] = []
        self.refusal: errors.RestoreError | None = None
        self.seen_by: set[str] | None = None  # None is everybody

    async def authorize(self, call: Call, action: str, arguments: Mapping[str, Any]) -> None:
        self.asked.append((action, dict(arguments), call.interactive))
        if self.refusal:
            raise self.refusal

    async def visible_to(self, call: Call) -> bool:
        assert not call.interactive
        return self.seen_by is None or call.sender in self.seen_by


class Manager(Object, interface=MANAGER):
    @method("Sum", "uua{sv}", "u", action="read", arguments=("a", "b", "options"), results=("sum",))
    async def sum(self, _call: Call, a: int, b: int, options: dict[str, Any]) -> int:
        assert not options
        return a + b

    @method(
        "Options",
        "a{sv}",
        "as",
        action="list-backups",
        arguments=("options",),
        results=("given",),
        options={"limit": "u", "cursor": "s"},
    )
    async def options(self, _call: Call, options: dict[str, Any]) -> list[str]:
        return [f"{name}={value!r}" for name, value in sorted(options.items())]

    @prop("Version", "s", broadcast=True)
    def version(self) -> str:
        return "1"


class Catalog(Object, interface=CATALOG):
    @method("Scan", "a{sv}", action="manage", arguments=("options",))
    async def scan(self, _call: Call, _options: dict[str, Any]) -> None:
        pass


class Root(Manager, Catalog):
    pass


class Mount(Object, interface=MOUNT):
    completed = Signal("Completed", "bs", ("success", "message"))

    def __init__(self, number: int, directory: Path) -> None:
        super().__init__(f"{ROOT}/mounts/{number}")
        self.state_now: object = "mounting"
        self.directory = directory
        self.secret_name = f"vm-{number}"
        self.secrets: list[bytes] = []

    @method("Open", "sa{sv}", "hs", action="read", arguments=("path", "options"), results=("file", "name"))
    async def open(self, _call: Call, path: str, _options: dict[str, Any]) -> tuple[Fd, str]:
        return Fd(os.open(self.directory / path, os.O_RDONLY)), path

    @method("OpenBadly", "sa{sv}", "hs", action="read", arguments=("path", "options"), results=("file", "name"))
    async def open_badly(self, _call: Call, path: str, _options: dict[str, Any]) -> object:
        fd = Fd(os.open("/dev/null", os.O_RDONLY))
        return {"no name": fd, "swapped": ("name", fd), "bad text": (fd, "a\0b"), "three": (fd, "a", "b")}[path]

    @method("Unlock", "sha{sv}", action="unlock", arguments=("volume", "secret", "options"))
    async def unlock(self, _call: Call, _volume: str, secret: int, _options: dict[str, Any]) -> None:
        self.secrets.append(os.read(secret, 100))

    @prop("State", "s", broadcast=True)
    def state(self) -> object:
        if isinstance(self.state_now, Exception):
            raise self.state_now
        return self.state_now

    @prop("Busy", "b", broadcast=True)
    def busy(self) -> bool:
        return False

    @prop("VmName", "s")
    def vm_name(self) -> str:
        return self.secret_name


@pytest.fixture
async def exports(bus_address: str) -> AsyncIterator[Exports]:
    tree: Exports

    async def handle(call: Call) -> Reply:
        return await tree.handle(call)

    async def unknown(call: Call) -> errors.RestoreError | None:
        return errors.Expired("it has ended; mount it again") if call.path.startswith(f"{ROOT}/mounts/gone") else None

    bus = await Bus.connect(bus_address, handle)
    tree = Exports(bus, ROOT, unknown_object=unknown)
    yield tree
    await bus.close()


@pytest.fixture
def root(exports: Exports) -> Root:
    root = Root(ROOT)
    exports.add(root)
    return root


@pytest.fixture
def mounts(exports: Exports, root: Root, tmp_path: Path) -> list[Mount]:  # noqa: ARG001 - it comes first
    mounts = [Mount(number, tmp_path) for number in range(3)]
    for mount in mounts:
        exports.add(mount)
    return mounts


@pytest.fixture
def service(exports: Exports) -> str:
    return exports._bus.unique_name


async def call(
    peer: Peer,
    service: str,
    name: str,
    signature: str = "a{sv}",
    *body: object,
    path: str = ROOT,
    flags: MessageFlag = MessageFlag.NONE,
    fds: Sequence[int] = (),
) -> Message:
    interface, _, member = name.rpartition(".")
    body = body or (({},) if signature == "a{sv}" else ())
    return await peer.call(service, member, signature, body, path=path, interface=interface, flags=flags, fds=fds)


def standard_error(reply: Message) -> str:
    assert reply.message_type is MessageType.ERROR, reply.body
    return str(reply.error_name).removeprefix(STANDARD + "Error.")


# Methods


@pytest.mark.usefixtures("root")
async def test_a_method_is_called_with_its_arguments(peer: Peer, service: str) -> None:
    reply = await call(peer, service, f"{MANAGER}.Sum", "uua{sv}", 1, 2, {})
    assert (reply.signature, reply.body) == ("u", [3])
    assert (await call(peer, service, f"{CATALOG}.Scan")).body == []


async def test_authorization_is_asked_before_the_method_runs(peer: Peer, service: str, root: Root) -> None:
    await call(peer, service, f"{MANAGER}.Sum", "uua{sv}", 1, 2, {})
    assert root.asked == [("read", {"a": 1, "b": 2, "options": {}}, False)]


async def test_a_refused_caller_never_reaches_the_method(
    peer: Peer, service: str, mounts: list[Mount], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    mounts[0].refusal = errors.NotAuthorized("ask an administrator\nfor leave")
    reply = await call(peer, service, f"{MOUNT}.Open", "sa{sv}", "absent", {}, path=mounts[0].path)
    assert error_of(reply)[0] == "NotAuthorized"  # and not an internal error about a file that is not there
    (line,) = [record for record in caplog.records if "not answering" in record.getMessage()]
    assert line.levelname == "DEBUG"  # the history has it as a warning, and not more often than is good
    assert "Mount.Open" in line.getMessage()
    assert "\n" not in line.getMessage()
    assert vars(line)["uid"] == os.geteuid()


async def test_options_arrive_as_plain_values(peer: Peer, service: str, root: Root) -> None:
    options = {"limit": Variant("u", 5), "cursor": Variant("s", "x")}
    assert (await call(peer, service, f"{MANAGER}.Options", "a{sv}", options)).body == [["cursor='x'", "limit=5"]]
    assert root.asked[0][1] == {"options": {"limit": 5, "cursor": "x"}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limti": Variant("u", 5)}, ["'limti'", "auth.no_user_interaction, cursor, limit"]),
        ({"limit": Variant("i", 5)}, ["'limit'", "type i", "takes u", "4294967295"]),
        ({"auth.no_user_interaction": Variant("s", "yes")}, ["true or false"]),
    ],
    ids=["unknown", "wrong type", "wrong type of the general one"],
)
async def test_wrong_options_are_refused_with_what_is_right(
    peer: Peer, service: str, root: Root, options: dict[str, Variant], words: list[str]
) -> None:
    name, text = error_of(await call(peer, service, f"{MANAGER}.Options", "a{sv}", options))
    assert name == "InvalidOption"
    assert all(word in text for word in words), text
    assert not root.asked


@pytest.mark.parametrize(
    ("flag", "option", "interactive"),
    [(False, None, False), (True, None, True), (True, False, True), (True, True, False), (False, False, False)],
)
async def test_a_prompt_needs_the_flag_and_no_option_against_it(
    peer: Peer, service: str, root: Root, flag: bool, option: bool | None, interactive: bool
) -> None:
    options = {} if option is None else {"auth.no_user_interaction": Variant("b", option)}
    flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if flag else MessageFlag.NONE
    reply = await call(peer, service, f"{MANAGER}.Options", "a{sv}", options, flags=flags)
    assert reply.body == [[]]
    assert [asked[2] for asked in root.asked] == [interactive]


@pytest.mark.parametrize(
    ("name", "signature", "body", "path", "error"),
    [
        (f"{MANAGER}.Sum", "ssa{sv}", ("a", "b", {}), ROOT, "InvalidArgs"),
        (f"{MANAGER}.Sum", "", (), ROOT, "InvalidArgs"),
        (f"{MANAGER}.Absent", "a{sv}", ({},), ROOT, "UnknownMethod"),
        ("com.example.Absent.Sum", "a{sv}", ({},), ROOT, "UnknownInterface"),
        (f"{MANAGER}.sum", "a{sv}", ({},), ROOT, "UnknownMethod"),
        (f"{MANAGER}.authorize", "a{sv}", ({},), ROOT, "UnknownMethod"),
        (f"{MANAGER}.Sum", "a{sv}", ({},), "/", "UnknownObject"),
        (f"{MANAGER}.Sum", "a{sv}", ({},), f"{ROOT}/mounts", "UnknownObject"),
        (f"{STANDARD}Properties.Get", "s", ("x",), ROOT, "InvalidArgs"),
        (f"{STANDARD}Properties.Take", "s", ("x",), ROOT, "UnknownMethod"),
        (f"{STANDARD}Peer.Pong", "", (), ROOT, "UnknownMethod"),
        (f"{STANDARD}ObjectManager.GetManagedObjects", "", (), f"{ROOT}/mounts/0", "UnknownInterface"),
    ],
)
@pytest.mark.usefixtures("mounts")
async def test_calls_of_what_is_not_there_have_the_standard_errors(
    peer: Peer,
    service: str,
    name: str,
    signature: str,
    body: tuple[Any, ...],
    path: str,
    error: str,
) -> None:
    assert standard_error(await call(peer, service, name, signature, *body, path=path)) == error


@pytest.mark.usefixtures("mounts")
async def test_a_path_where_something_was_is_told_so(peer: Peer, service: str) -> None:
    for name in (f"{MOUNT}.Open", f"{STANDARD}Properties.GetAll", f"{STANDARD}Introspectable.Introspect"):
        assert error_of(await call(peer, service, name, "", path=f"{ROOT}/mounts/gone"))[0] == "Expired"


# Descriptors


async def test_a_descriptor_is_handed_out_and_not_kept(
    peer: Peer, service: str, mounts: list[Mount], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    reply = await call(peer, service, f"{MOUNT}.Open", "sa{sv}", "file", {}, path=mounts[0].path)
    assert reply.body == [0, "file"]
    assert os.read(reply.unix_fds[0], 100) == b"content"
    os.close(reply.unix_fds[0])  # were ours still open, the test would be failed for it


@pytest.mark.parametrize("how", ["no name", "swapped", "bad text", "three"])
async def test_a_result_that_fits_not_the_declaration_leaks_no_descriptor(
    peer: Peer, service: str, mounts: list[Mount], how: str
) -> None:
    reply = await call(peer, service, f"{MOUNT}.OpenBadly", "sa{sv}", how, {}, path=mounts[0].path)
    assert error_of(reply)[0] == "Failed"


async def test_a_secret_comes_in_by_descriptor(peer: Peer, service: str, mounts: list[Mount]) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"secret")

    async def unlock(index: int) -> Message:
        arguments: tuple[object, ...] = ("partition-1", index, {})
        return await call(peer, service, f"{MOUNT}.Unlock", "sha{sv}", *arguments, path=mounts[0].path, fds=[reading])

    assert (await unlock(0)).message_type is MessageType.METHOD_RETURN
    assert mounts[0].secrets == [b"secret"]
    assert standard_error(await unlock(1)) == "InvalidArgs"  # the message brought one only
    os.close(reading)
    os.close(writing)


# Properties


async def test_properties_are_read_one_by_one_and_together(peer: Peer, service: str, mounts: list[Mount]) -> None:
    path = mounts[0].path
    got = await call(peer, service, f"{STANDARD}Properties.Get", "ss", MOUNT, "VmName", path=path)
    assert got.body == [Variant("s", "vm-0")]
    every = await call(peer, service, f"{STANDARD}Properties.GetAll", "s", MOUNT, path=path)
    assert {name: value.value for name, value in every.body[0].items()} == {
        "State": "mounting",
        "Busy": False,
        "VmName": "vm-0",
    }
    none = await call(peer, service, f"{STANDARD}Properties.GetAll", "s", f"{STANDARD}Peer", path=path)
    assert none.body == [{}]


@pytest.mark.parametrize(
    ("interface", "name", "error"),
    [
        (MOUNT, "State", "PropertyReadOnly"),
        (MOUNT, "Absent", "UnknownProperty"),
        ("com.example.Absent", "State", "UnknownInterface"),
        (f"{STANDARD}Peer", "State", "UnknownProperty"),
    ],
)
async def test_no_property_can_be_set(
    peer: Peer, service: str, mounts: list[Mount], interface: str, name: str, error: str
) -> None:
    arguments = ("ssv", interface, name, Variant("s", "x"))
    reply = await call(peer, service, f"{STANDARD}Properties.Set", *arguments, path=mounts[0].path)
    assert standard_error(reply) == error


async def test_what_a_caller_may_not_see_it_does_not_get(
    peer: Peer, stranger: Peer, service: str, mounts: list[Mount]
) -> None:
    mounts[0].seen_by = {peer.name}
    mounts[1].seen_by = set()
    for caller, seen in ((peer, [0, 2]), (stranger, [2])):
        paths = [f"{ROOT}/mounts/{number}" for number in seen]
        managed = await call(caller, service, f"{STANDARD}ObjectManager.GetManagedObjects", "")
        assert sorted(managed.body[0]) == paths
        assert managed.body[0][paths[0]][MOUNT]["VmName"] == Variant("s", f"vm-{seen[0]}")
        tree = await call(caller, service, f"{STANDARD}Introspectable.Introspect", "", path=f"{ROOT}/mounts")
        assert [node.get("name") for node in ET.fromstring(tree.body[0]) if node.tag == "node"] == [
            str(number) for number in seen
        ]
    flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION  # not a reason to prompt for a mere look
    for name, arguments in (("Get", ("ss", MOUNT, "VmName")), ("GetAll", ("s", MOUNT))):
        reply = await call(
            stranger, service, f"{STANDARD}Properties.{name}", *arguments, path=mounts[0].path, flags=flags
        )
        assert error_of(reply)[0] == "NotAuthorized"


@pytest.mark.parametrize("value", [RuntimeError("broken"), None, 5, "nul \0", "lone \udcff"])
async def test_a_bad_property_spoils_only_itself(
    peer: Peer, service: str, mounts: list[Mount], value: object, caplog: pytest.LogCaptureFixture
) -> None:
    mounts[1].state_now = value
    managed = (await call(peer, service, f"{STANDARD}ObjectManager.GetManagedObjects", "")).body[0]
    assert [sorted(managed[mount.path][MOUNT]) for mount in mounts] == [
        ["Busy", "State", "VmName"],
        ["Busy", "VmName"],
        ["Busy", "State", "VmName"],
    ]
    assert "leaving out property State of" in caplog.text
    reply = await call(peer, service, f"{STANDARD}Properties.Get", "ss", MOUNT, "State", path=mounts[1].path)
    assert error_of(reply)[0] == "Failed"


# Signals


@pytest.mark.usefixtures("root")
async def test_coming_and_going_is_told_once_from_the_manager_and_with_broadcast_properties_only(
    peer: Peer, exports: Exports, tmp_path: Path
) -> None:
    await peer.listen(f"type='signal',interface='{STANDARD}ObjectManager'")
    mount = Mount(7, tmp_path)
    exports.add(mount)
    exports.remove(mount)
    exports.remove(mount)
    (added,) = await peer.wait_for("InterfacesAdded")
    (removed,) = await peer.wait_for("InterfacesRemoved")
    assert (added.path, removed.path) == (ROOT, ROOT)
    assert added.body == [mount.path, {MOUNT: {"State": Variant("s", "mounting"), "Busy": Variant("b", False)}}]
    assert removed.body == [mount.path, [MOUNT]]


async def test_changes_are_told_from_the_object_and_only_what_changed(
    peer: Peer, exports: Exports, mounts: list[Mount]
) -> None:
    await peer.listen(f"type='signal',interface='{STANDARD}Properties'")
    mount = mounts[0]
    exports.changed(mount, ["State", "Busy", "VmName"])
    mount.state_now, mount.secret_name = "mounted", "other"
    exports.changed(mount, ["Busy"])
    exports.changed(mount, ["State", "Busy", "VmName"])
    exports.changed(mount, ["State", "Busy", "VmName"])
    exports.remove(mount)
    mount.state_now = "failed"
    exports.changed(mount, ["State"])
    mounts[1].state_now = "the last"
    exports.changed(mounts[1], ["State"])
    first, last = await peer.wait_for("PropertiesChanged", 2)
    assert (first.path, first.body) == (mount.path, [MOUNT, {"State": Variant("s", "mounted")}, []])
    assert (last.path, last.body) == (mounts[1].path, [MOUNT, {"State": Variant("s", "the last")}, []])


async def test_a_declared_signal_goes_to_whom_it_is_for(
    peer: Peer, stranger: Peer, exports: Exports, mounts: list[Mount]
) -> None:
    for each in (peer, stranger):
        await each.listen(f"type='signal',interface='{MOUNT}'")
    exports.emit(mounts[0], "Completed", True, "to one", destination=peer.name)
    exports.emit(mounts[0], "Completed", True, "to all")
    await stranger.wait_for("Completed")
    assert [message.body for message in stranger.all("Completed")] == [[True, "to all"]]
    assert [message.body for message in await peer.wait_for("Completed", 2)] == [[True, "to one"], [True, "to all"]]
    with pytest.raises(ValueError, match="declares no signal"):
        exports.emit(mounts[0], "Absent")


# The tree


async def test_the_tree_can_be_walked_from_the_top(peer: Peer, service: str, mounts: list[Mount]) -> None:
    found: dict[str, list[str]] = {}

    async def walk(path: str) -> None:
        reply = await call(peer, service, f"{STANDARD}Introspectable.Introspect", "", path=path)
        node = ET.fromstring(reply.body[0])
        found[path] = [each.get("name", "") for each in node if each.tag == "interface"]
        for each in node:
            if each.tag == "node":
                await walk(f"{path.rstrip('/')}/{each.get('name')}")

    await walk("/")
    everywhere = [f"{STANDARD}Introspectable", f"{STANDARD}Peer"]
    assert found == {
        "/": everywhere,
        "/com": everywhere,
        "/com/sendense": everywhere,
        ROOT: [CATALOG, MANAGER, *everywhere, f"{STANDARD}Properties", f"{STANDARD}ObjectManager"],
        f"{ROOT}/mounts": everywhere,
        **{mount.path: [MOUNT, *everywhere, f"{STANDARD}Properties"] for mount in mounts},
    }


@pytest.mark.usefixtures("root")
async def test_a_path_that_begins_like_an_object_is_none(
    peer: Peer, service: str, exports: Exports, tmp_path: Path
) -> None:
    exports.add(Mount(12, tmp_path))
    for path in (f"{ROOT}/mounts/1", f"{ROOT}/mount", "/com/send"):
        reply = await call(peer, service, f"{STANDARD}Introspectable.Introspect", "", path=path)
        assert standard_error(reply) == "UnknownObject"


async def test_introspection_says_what_the_declarations_say(peer: Peer, service: str, mounts: list[Mount]) -> None:
    introspection = await peer.bus.introspect(service, mounts[0].path)
    (interface,) = [each for each in introspection.interfaces if each.name == MOUNT]
    assert [(m.name, m.in_signature, m.out_signature) for m in interface.methods] == [
        ("Open", "sa{sv}", "hs"),
        ("OpenBadly", "sa{sv}", "hs"),
        ("Unlock", "sha{sv}", ""),
    ]
    assert [(p.name, p.signature, p.access.value) for p in interface.properties] == [
        ("State", "s", "read"),
        ("Busy", "b", "read"),
        ("VmName", "s", "read"),
    ]
    assert [(s.name, s.signature) for s in interface.signals] == [("Completed", "bs")]


@pytest.mark.usefixtures("root")
async def test_peer_answers_anywhere(
    peer: Peer, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/", ROOT, "/nowhere"):
        assert (await call(peer, service, f"{STANDARD}Peer.Ping", "", path=path)).body == []
    monkeypatch.setattr(exports_module, "_MACHINE_IDS", (tmp_path / "absent", tmp_path / "machine-id"))
    assert error_of(await call(peer, service, f"{STANDARD}Peer.GetMachineId", ""))[0] == "Unavailable"
    (tmp_path / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    reply = await call(peer, service, f"{STANDARD}Peer.GetMachineId", "")
    assert reply.body == ["0123456789abcdef0123456789abcdef"]


@pytest.mark.usefixtures("root")
async def test_a_path_is_taken_once_and_lies_below_the_root(exports: Exports) -> None:
    with pytest.raises(ValueError, match="already"):
        exports.add(Root(ROOT))
    with pytest.raises(ValueError, match="not below"):
        exports.add(Root("/com/sendense/Restore10"))


# Declarations


def test_describe_gives_the_declarations_as_data() -> None:
    interfaces = describe([Root, Mount])
    assert set(interfaces) == {MANAGER, CATALOG, MOUNT}
    options = interfaces[MANAGER].methods["Options"]
    assert (options.signature, options.result, options.action) == ("a{sv}", "as", "list-backups")
    assert (options.arguments, options.results) == (("options",), ("given",))
    assert options.options == {"limit": "u", "cursor": "s", "auth.no_user_interaction": "b"}
    assert {name: (each.signature, each.broadcast) for name, each in interfaces[MOUNT].properties.items()} == {
        "State": ("s", True),
        "Busy": ("b", True),
        "VmName": ("s", False),
    }
    assert interfaces[MOUNT].signals["Completed"].arguments == ("success", "message")


@pytest.mark.parametrize(
    "declaration",
    [
        lambda: method("M", "s", action="read", arguments=("path",)),
        lambda: method("M", "a{sv}s", action="read", arguments=("options", "path")),
        lambda: method("M", "sa{sv}", action="read", arguments=("options",)),
        lambda: method("M", "a{sv}", "ss", action="read", arguments=("options",), results=("one",)),
        lambda: method("M", "a{sv}", action="", arguments=("options",)),
        lambda: method("M", "a{sv}", action="read", arguments=("options",))(lambda *_: None),
        lambda: prop("P", "ss"),
        lambda: Signal("S", "ss", ("one",)),
    ],
)
def test_a_wrong_declaration_does_not_get_past_the_import(declaration: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        declaration()


def test_a_member_needs_an_interface() -> None:
    with pytest.raises(TypeError, match="names no interface"):

        class Nameless(Object):
            @prop("P", "s")
            def value(self) -> str:
                return ""


def test_unpack_names_what_is_wrong() -> None:
    known = {"name": "s", "count": "u"}
    assert unpack({"name": Variant("s", "x")}, known) == {"name": "x"}
    with pytest.raises(errors.InvalidOption, match="no key 'nam'; known are count, name"):
        unpack({"nam": Variant("s", "x")}, known, "key")
    with pytest.raises(errors.InvalidOption, match="takes u"):
        unpack({"count": Variant("s", "1")}, known)


async def test_objects_that_go_while_they_are_listed_are_left_out(
    peer: Peer, service: str, exports: Exports, mounts: list[Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_: Call) -> bool:
        asked.set()
        await go_on.wait()
        return True

    monkeypatch.setattr(mounts[0], "visible_to", slowly)
    listing = asyncio.create_task(call(peer, service, f"{STANDARD}ObjectManager.GetManagedObjects", ""))
    await asked.wait()
    exports.remove(mounts[0])
    go_on.set()
    assert sorted((await listing).body[0]) == [mount.path for mount in mounts[1:]]
