"""Where each program runs: what links, perf events, devices, cgroups, namespaces and maps say.

No single list has it. A link is an object with an id; a tc filter, an XDP program without a link
and a cgroup program without one are fields of what they are attached to, and each of these has to
be asked: devices by netlink, in every network namespace; cgroups, namespaces, sock maps and
infrared devices by ``BPF_PROG_QUERY``. A program can also be reached through another one: by a
tail call, as the entry of a devmap, or in the place of a function of it.

The kernel tells of some nowhere: which socket a filter guards, which route a tunnel program, when
``BPF_PROG_RUN`` is called. Those are *hidden*, never "attached nowhere"; and where a part of the
machine could not be asked, it says *unknown*.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Final

from labkit.errors import Unavailable
from labkit.kernel import btf, libbpf, netlink
from labkit.kernel.objects import LinkObject, Objects, ProgramObject, mount_point

_LIMIT_S: Final = 3.0
"""For the namespaces, and for the cgroups, of a machine."""

_MOST_NAMESPACES: Final = 1_024
_MOST_CGROUPS: Final = 20_000
_MOST_ENTRIES: Final = 65_536
_CLONE_NEWNET: Final = 0x40000000
_FIRST_PID_NAMESPACE: Final = "pid:[4026531836]"  # PROC_PID_INIT_INO

# enum bpf_attach_type, by the names that bpftool takes.
_CGROUP_HOOKS: Final[Mapping[str, tuple[tuple[int, str], ...]]] = {
    "cgroup_skb": ((0, "ingress"), (1, "egress")),
    "cgroup_sock": (
        (2, "sock_create"), (12, "post_bind4"), (13, "post_bind6"), (34, "sock_release"),
    ),
    "sock_ops": ((3, "sock_ops"),),
    "cgroup_device": ((6, "device"),),
    "cgroup_sock_addr": (
        (8, "bind4"), (9, "bind6"), (10, "connect4"), (11, "connect6"), (14, "sendmsg4"),
        (15, "sendmsg6"), (19, "recvmsg4"), (20, "recvmsg6"), (29, "getpeername4"),
        (30, "getpeername6"), (31, "getsockname4"), (32, "getsockname6"),
        (49, "cgroup_unix_connect"), (50, "cgroup_unix_sendmsg"), (51, "cgroup_unix_recvmsg"),
        (52, "cgroup_unix_getpeername"), (53, "cgroup_unix_getsockname"),
    ),
    "cgroup_sysctl": ((18, "sysctl"),),
    "cgroup_sockopt": ((21, "getsockopt"), (22, "setsockopt")),
}  # fmt: skip
_NAMESPACE_HOOKS: Final = ((17, "flow_dissector"), (36, "sk_lookup"))
_DEVICE_HOOKS: Final = (
    (46, "tcx ingress"), (47, "tcx egress"), (54, "netkit primary"), (55, "netkit peer"),
)  # fmt: skip
_SOCKMAP_HOOKS: Final = (
    (4, "sk_skb_stream_parser"), (5, "sk_skb_stream_verdict"), (7, "sk_msg_verdict"),
    (38, "sk_skb_verdict"),
)  # fmt: skip
_LIRC_MODE2: Final = 16
_HOOK_NAMES: Final = {
    number: name
    for hooks in (*_CGROUP_HOOKS.values(), _NAMESPACE_HOOKS, _DEVICE_HOOKS, _SOCKMAP_HOOKS)
    for number, name in hooks
} | {24: "fentry", 25: "fexit", 26: "fmod_ret", 27: "lsm", 28: "iter", 23: "tp_btf", 43: "lsm"}

_NETWORK, _CGROUPS, _PROCESSES, _EVENTS = "network", "cgroups", "processes", "perf events"
_SEEN_WHOLE: Final = ""
_WHERE_SEEN: Final[Mapping[str, str]] = {
    **dict.fromkeys(("tc", "tc_action", "xdp", "flow_dissector", "sk_lookup"), _NETWORK),
    **dict.fromkeys(_CGROUP_HOOKS, _CGROUPS),
    **dict.fromkeys(("kprobe", "tracepoint"), _PROCESSES),
    "perf_event": _EVENTS,
    # By a map or a file that can always be asked, or by a link alone.
    **dict.fromkeys(("sk_skb", "sk_msg", "lirc_mode2"), _SEEN_WHOLE),
    **dict.fromkeys(("raw_tracepoint", "raw_tracepoint_writable", "tracing"), _SEEN_WHOLE),
    **dict.fromkeys(("lsm", "ext", "netfilter"), _SEEN_WHOLE),
}
_ITERATOR: Final = "iterator"  # a tracing program that is linked for as long as it is read
_HIDDEN_WHERE: Final[Mapping[str, str]] = {
    "socket_filter": "the kernel does not tell which socket or rule it guards",
    "sk_reuseport": "the kernel does not tell which group of sockets it serves",
    "syscall": "it runs when a process calls BPF_PROG_RUN",
    "struct_ops": "its struct_ops map says whether it is registered",
    _ITERATOR: "it is an iterator, which runs when somebody reads it",
    **dict.fromkeys(
        ("lwt_in", "lwt_out", "lwt_xmit", "lwt_seg6local"),
        "it runs for routes, which do not tell its id",
    ),
}
_PLACES: Final = {
    "ifindex": "device", "cgroup_id": "cgroup", "netns_ino": "network namespace", "map_id": "map",
}  # fmt: skip
_DECIDES: Final = ("tc ", "tcx ", "netkit ", "xdp", "cgroup ", "flow_dissector", "sk_lookup",
                   "sk_", "lsm", "fmod_ret", "netfilter")  # fmt: skip


class Standing(Enum):
    """Whether a program runs, as far as can be known."""

    ATTACHED = "attached"
    HIDDEN = "hidden"
    UNKNOWN = "unknown"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class Attachment:
    """One place at which one program runs.

    Attributes
    ----------
    program_id : int
        The program.
    hook : str
        ``tc ingress``, ``xdp generic``, ``cgroup connect4``, ``raw_tracepoint``, ...
    target : str
        Device, cgroup, map, event or function; with its kind where the hook does not say that.
    namespace : str
        Network namespace of the device, unless it is that of this process.
    priority, handle, chain : int or None
        Of a tc filter; the lowest priority runs first.
    more : str
        What else the kernel says: ``direct-action``, a protocol, a tail call's map.
    link_id : int or None
        The link, where it is one; ``pins`` are the link's.
    map_id : int or None
        The map for whose entries it runs: a sock map, or a struct_ops map.
    detach : str
        A command that ends it; empty where it ends with the process that holds it.
    idle : str
        Why nothing gets there as things stand: the device is down, the cgroup is empty.
    """

    program_id: int
    hook: str
    target: str = ""
    namespace: str = ""
    priority: int | None = None
    handle: int | None = None
    chain: int | None = None
    more: str = ""
    link_id: int | None = None
    pins: tuple[str, ...] = ()
    detach: str = ""
    map_id: int | None = None
    idle: str = ""

    @property
    def point(self) -> tuple[str, str, str]:
        """What two programs have in common that see the same traffic or event."""
        hook = self.hook.replace("tcx ", "tc ") if self.hook.startswith("tcx ") else self.hook
        return hook, self.target, self.namespace

    @property
    def decides(self) -> bool:
        """Whether a program there settles what happens, so that a second one matters."""
        return self.hook.startswith(_DECIDES)

    def __str__(self) -> str:
        """For a sentence: ``tc ingress of dev eth0, pref 1, handle 0x1``."""
        words = [f"{self.hook} of {self.target}" if self.target else self.hook]
        if self.namespace:
            words[0] += f" in {self.namespace}"
        if self.priority is not None:
            words.append(f"pref {self.priority}")
        if self.handle is not None:
            words.append(f"handle {self.handle:#x}")
        if self.chain:
            words.append(f"chain {self.chain}")
        if self.more:
            words.append(self.more)
        if self.link_id is not None:
            words.append(f"link {self.link_id}")
        words += [f"pinned at {pin}" for pin in self.pins]
        if self.idle:
            words.append(self.idle)
        return ", ".join(words)


@dataclass(frozen=True)
class Survey:
    """Where the programs of a machine run, at about one moment.

    Attributes
    ----------
    attachments : tuple of Attachment
        In no particular order.
    detached : tuple of LinkObject
        Links that have lost what they were attached to: its device, cgroup or map is gone.
    callers : mapping from int to tuple of (int, str)
        By program: programs that reach it, and how.
    kinds : mapping from int to str
        Type of each program.
    unseen : mapping from str to str
        What could not be looked at, as a clause, by part of the machine.
    """

    attachments: tuple[Attachment, ...] = ()
    detached: tuple[LinkObject, ...] = ()
    callers: Mapping[int, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    kinds: Mapping[int, str] = field(default_factory=dict)
    unseen: Mapping[str, str] = field(default_factory=dict)

    def of(self, program_id: int) -> tuple[Attachment, ...]:
        """Where a program runs by itself, or by which program it is reached.

        A way through another program counts where that one may run.
        """
        ways = tuple(
            Attachment(program_id, how, f"program {caller}", idle=self._idle(caller))
            for caller, how in self.callers.get(program_id, ())
            if self.standing(caller) is not Standing.NOWHERE
        )
        return self._direct.get(program_id, ()) + ways

    def for_map(self, map_id: int) -> tuple[int, ...]:
        """Programs that run for the entries of a map, whether they refer to it or not."""
        return self._for_maps.get(map_id, ())

    def standing(self, program_id: int) -> Standing:
        """Whether a program runs: by itself, or through one that does."""
        return self._standing(program_id, frozenset())

    def blind(self, program_id: int) -> str:
        """Why nobody can say whether a program runs; empty where that is known."""
        kind = self.kinds.get(program_id, "")
        if kind not in _WHERE_SEEN:
            return _HIDDEN_WHERE.get(kind, f"nothing is known of programs of {kind}")
        return self.unseen.get(_WHERE_SEEN[kind]) or self.unseen.get(_tail_calls(kind)) or ""

    def _idle(self, program_id: int) -> str:
        """Why nothing gets to a program by itself; empty where something may."""
        places = self._direct.get(program_id, ())
        return places[0].idle if places and all(at.idle for at in places) else ""

    @functools.cached_property
    def _direct(self) -> dict[int, tuple[Attachment, ...]]:
        found: dict[int, list[Attachment]] = {}
        for one in self.attachments:
            found.setdefault(one.program_id, []).append(one)
        return {program_id: tuple(some) for program_id, some in found.items()}

    @functools.cached_property
    def _for_maps(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, set[int]] = {}
        for one in self.attachments:
            if one.map_id is not None:
                found.setdefault(one.map_id, set()).add(one.program_id)
        return {map_id: tuple(sorted(some)) for map_id, some in found.items()}

    def _standing(self, program_id: int, asked: frozenset[int]) -> Standing:
        kind = self.kinds.get(program_id, "")
        # A replacement of a function runs when the program does whose function that was.
        if program_id in self._direct and not (kind == "ext" and program_id in self.callers):
            return Standing.ATTACHED
        found = {
            self._standing(caller, asked | {program_id})
            for caller, _ in self.callers.get(program_id, ())
            if caller not in asked
        }
        if kind not in _WHERE_SEEN:
            found.add(Standing.HIDDEN)
        elif self.blind(program_id):
            found.add(Standing.UNKNOWN)
        return next((one for one in Standing if one in found), Standing.NOWHERE)


def survey(now: Objects) -> Survey:
    """Ask everything that can run a program.

    Nothing is changed. A thread of its own enters the network namespaces, so that this process
    stays where it is. Namespaces and cgroups are given a few seconds each; what is left then is
    in ``unseen``.

    Parameters
    ----------
    now : Objects
        A snapshot of a moment ago.

    Returns
    -------
    Survey
        Programs that have gone since are missing, without a word.
    """
    look = _Look(now)
    look.links()
    look.perf_events()
    look.networks()
    look.cgroups()
    look.maps()
    look.infrared()
    return look.survey()


def queried(target: int, attach_type: int) -> list[int]:
    """Ids of the programs that a cgroup, namespace, device, map or file runs at one hook.

    Parameters
    ----------
    target : int
        Descriptor, or for devices (tcx, netkit) their index in the namespace of this thread.
    attach_type : int
        Number in ``enum bpf_attach_type``.

    Raises
    ------
    OSError
        The kernel's answer; EINVAL where it does not know the hook.
    """
    room = 16
    while True:
        ids = (ctypes.c_uint32 * room)()
        count, flags = ctypes.c_uint32(room), ctypes.c_uint32()
        result = libbpf.api().bpf_prog_query(
            target, attach_type, 0, ctypes.byref(flags), ids, ctypes.byref(count)
        )
        if result != -errno.ENOSPC or count.value <= room:
            libbpf.checked(result, "asking for attached programs")
            return list(ids[: min(count.value, room)])
        room = count.value


class _Look:
    """The attachments, as they are found."""

    def __init__(self, now: Objects) -> None:
        self._now = now
        self._kinds = {
            one.id: _ITERATOR if _iterates(one) else one.kind for one in now.programs.values()
        }
        self._present = set(self._kinds.values())
        self._found: list[Attachment] = []
        self._detached: list[LinkObject] = []
        self._callers: dict[int, set[tuple[int, str]]] = {}
        self._unseen: dict[str, str] = {}
        # Links that say no more than a number, which only the namespace or the tree explains.
        self._open_links: dict[tuple[str, int, int], LinkObject] = {}

    def survey(self) -> Survey:
        for (_, _, place), link in self._open_links.items():
            kind = next((name for name in _PLACES if name in link.fields), "place")
            where = f"{_PLACES.get(kind, kind)} {place}, which is out of sight"
            self._add(link.program_id, _hook_of(link), where, link=link)
        return Survey(
            tuple(self._found),
            tuple(self._detached),
            {program_id: tuple(sorted(some)) for program_id, some in self._callers.items()},
            self._kinds,
            self._unseen,
        )

    def _add(
        self, program_id: int, hook: str, target: str = "", *, link: LinkObject | None = None,
        detach: str = "", **more: object,
    ) -> None:  # fmt: skip
        found = Attachment(program_id, hook, target, detach=detach)
        if link is not None:
            found = replace(found, link_id=link.id, pins=link.pins, detach=_detach_link(link))
        self._found.append(replace(found, **more))  # type: ignore[arg-type]

    # -- links and perf events ---------------------------------------------------------------

    def links(self) -> None:
        for link in self._now.links.values():
            places = [name for name in _PLACES if name in link.fields]
            if any(link.fields[name] == "0" for name in places) and link.kind not in (
                "iter", "struct_ops",
            ):  # fmt: skip
                self._detached.append(link)
            elif link.kind in ("xdp", "tcx", "netkit", "cgroup", "netns"):
                place = int(link.fields[places[0]]) if places else 0
                self._open_links[_link_key(link), link.program_id, place] = link
            elif link.kind == "perf_event" and any(
                one.program_id == link.program_id for one in self._now.perf_attachments
            ):
                continue  # the event itself says more
            else:
                served = (
                    int(link.fields["map_id"])
                    if "map_id" in places and link.kind != "iter"
                    else None
                )
                self._add(
                    link.program_id, _hook_of(link), _target_of(link), link=link, map_id=served
                )
            target = link.fields.get("target_obj_id", "0")
            if self._kinds.get(link.program_id) == "ext" and target != "0":
                self._reach(link.program_id, int(target), "replacement of a function")

    def perf_events(self) -> None:
        links = {
            link.program_id: link for link in self._now.links.values() if link.kind == "perf_event"
        }
        of_process = {one.pid for one in self._now.perf_attachments if not one.program_id}
        seen = set()
        for one in self._now.perf_attachments:
            what = (one.program_id, one.kind, one.target)
            if one.program_id and what not in seen:
                seen.add(what)  # once for each CPU, or for each process that holds it
                link = links.get(one.program_id)
                self._add(one.program_id, one.kind, one.target, link=link)
        for program in self._now.programs.values():
            if program.kind == "perf_event" and of_process & {*program.pids}:
                self._add(program.id, "perf_event", more="as the process that holds it has one")
        if of_process and not all(
            of_process & {*one.pids}
            for one in self._now.programs.values()
            if one.kind == "perf_event"
        ):
            self._unseen[_EVENTS] = (
                "the kernel does not tell which program of type perf_event an event runs"
            )
        if not _sees_all_processes():
            for part in (_PROCESSES, _EVENTS):
                self._unseen[part] = "processes outside of this PID namespace are out of sight"

    # -- network namespaces ------------------------------------------------------------------

    def networks(self) -> None:
        wanted = {"tc", "tc_action", "xdp", "flow_dissector", "sk_lookup"}
        if not wanted & self._present:
            return
        with ThreadPoolExecutor(1, "network namespaces") as alone:
            alone.submit(self._in_each_network).result()
        if not _sees_all_processes():
            self._unseen.setdefault(
                _NETWORK,
                "network namespaces of processes outside of this PID namespace are out of sight",
            )

    def _in_each_network(self) -> None:
        """Enter one namespace after the other; for a thread that ends thereafter."""
        libc = ctypes.CDLL(None, use_errno=True)
        deadline = time.monotonic() + _LIMIT_S
        missed = 0
        for turn, (inode, path) in enumerate(self._now.network_namespaces.items()):
            if turn >= _MOST_NAMESPACES or time.monotonic() > deadline:
                missed += len(self._now.network_namespaces) - turn
                break
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # its process has ended since, and so has it, or another path leads there
            try:
                if os.fstat(fd).st_ino != inode:
                    continue  # the number of a process was given anew
                if libc.setns(fd, _CLONE_NEWNET) != 0:
                    missed += 1
                    continue
                self._network(_Namespace.of(inode, path, self._now, own=turn == 0), fd)
            except OSError:
                missed += 1
            finally:
                os.close(fd)
        if missed:
            self._unseen[_NETWORK] = (
                f"{missed:,} of {len(self._now.network_namespaces):,} network namespaces could not "
                "be looked into"
            )

    def _network(self, space: _Namespace, fd: int) -> None:
        for number, name in _NAMESPACE_HOOKS:
            if name in self._present:
                for program_id in _answered(fd, number):
                    link = self._link(f"netns {number}", program_id, space.inode)
                    command = f"bpftool prog detach id {program_id} {name}"
                    self._add(
                        program_id, name, space.words or "this network namespace", link=link,
                        detach=space.command(command),
                    )  # fmt: skip
        with netlink.Netlink() as asked:
            devices = asked.devices()
            for device in devices:
                self._xdp(space, device)
                if "tc" in self._present:
                    self._without_qdisc(space, device)
            if {"tc", "tc_action"} & self._present:
                self._traffic_control(space, asked, {one.index: one for one in devices})

    def _xdp(self, space: _Namespace, device: netlink.Device) -> None:
        name = libbpf.shown(device.name)
        modes = {"native": "xdpdrv", "generic": "xdpgeneric", "offload": "xdpoffload"}
        for mode, program_id in device.xdp:
            link = self._link("xdp", program_id, device.index)
            self._add(
                program_id, f"xdp {mode}", f"dev {name}", namespace=space.words, link=link,
                idle=_idle(device),
                detach=_detach_link(link)
                or space.command(f"ip link set dev {_word(name)} {modes[mode]} off"),
            )  # fmt: skip

    def _without_qdisc(self, space: _Namespace, device: netlink.Device) -> None:
        """Programs of tcx and netkit."""
        name = libbpf.shown(device.name)
        for number, hook in _DEVICE_HOOKS:
            for turn, program_id in enumerate(_answered(device.index, number)):
                link = self._link(f"dev {number}", program_id, device.index)
                # bpftool ends a program of tcx without a link, and none of netkit.
                command = space.command(
                    f"bpftool net detach {hook.replace(' ', '_')} dev {_word(name)}"
                )
                self._add(
                    program_id, hook, f"dev {name}", link=link, namespace=space.words,
                    more=f"number {turn + 1} in turn", idle=_idle(device),
                    detach=_detach_link(link) or (command if hook.startswith("tcx") else ""),
                )  # fmt: skip

    def _traffic_control(
        self, space: _Namespace, asked: netlink.Netlink, devices: Mapping[int, netlink.Device]
    ) -> None:
        seen: set[tuple[int, int, int, int]] = set()
        for index, parents in asked.filter_parents().items():
            if index not in devices:
                continue
            for parent in dict.fromkeys(parents):
                for one in asked.filters(index, parent):
                    if one.block is not None:  # told once for each device that shares it
                        key = (one.block, one.chain, one.priority, one.handle)
                        if key in seen:
                            continue
                        seen.add(key)
                    self._filter(space, devices[index], parent, one)
        with suppress(OSError):  # a kernel without act_bpf knows no such list
            for action in asked.actions():
                if action.filters:
                    self._add(
                        action.program_id, "tc action", f"index {action.index}",
                        namespace=space.words, more=f"of {action.filters} filters",
                    )  # fmt: skip

    def _filter(
        self, space: _Namespace, device: netlink.Device, parent: int, one: netlink.Filter
    ) -> None:
        side = {netlink.INGRESS: "ingress", netlink.EGRESS: "egress", 0xFFFF0000: "ingress"}
        name = libbpf.shown(device.name)
        hook, place = side.get(parent, ""), f"dev {_word(name)}"
        if one.block is not None:
            place, at = f"block {one.block}", ""
        else:
            at = f" {hook}" if hook else f" parent {_classid(parent)}" if parent else ""
        chain = f" chain {one.chain}" if one.chain else ""
        protocol = {3: "all", 0x800: "ip", 0x86DD: "ipv6", 0x806: "arp"}.get(
            one.protocol, f"{one.protocol:#06x}"
        )
        words = ["direct-action"] if one.direct else ["without direct-action"]
        if protocol != "all":
            words.append(f"protocol {protocol}")
        if one.block is not None:
            words.append(f"block {one.block} of several devices")
        self._add(
            one.program_id, f"tc {hook or 'qdisc ' + _classid(parent)}".strip(),
            f"dev {name}", namespace=space.words, priority=one.priority,
            handle=one.handle, chain=one.chain, more=", ".join(words),
            idle="" if one.block is not None else _idle(device),
            detach=space.command(
                f"tc filter del {place}{at}{chain} protocol {protocol} pref {one.priority} "
                f"handle {one.handle:#x} bpf"
            ),
        )  # fmt: skip

    # -- cgroups, maps, infrared -------------------------------------------------------------

    def cgroups(self) -> None:
        hooks = [
            hook for kind, some in _CGROUP_HOOKS.items() if kind in self._present for hook in some
        ]
        lsm = any(link.kind == "cgroup" for link in self._open_links.values())
        if not hooks and not lsm:
            return
        tree = _cgroup_tree()
        if tree is None:
            self._unseen[_CGROUPS] = "no file system of cgroups (cgroup2) is mounted"
            return
        top, whole = tree
        deadline = time.monotonic() + _LIMIT_S
        for turn, folder in enumerate(_folders(top)):
            if turn >= _MOST_CGROUPS or time.monotonic() > deadline:
                self._unseen[_CGROUPS] = f"only {turn:,} cgroups were asked"
                return
            with suppress(OSError):  # removed since
                self._cgroup(folder, hooks)
        if not whole:
            self._unseen[_CGROUPS] = "cgroups above those of this cgroup namespace are out of sight"

    def _cgroup(self, folder: str, hooks: list[tuple[int, str]]) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            inode = os.fstat(fd).st_ino
            shown = libbpf.shown(os.fsencode(folder))
            idle = "no process is in that cgroup" if _is_empty(folder) else ""
            for number, name in hooks:
                for turn, program_id in enumerate(_answered(fd, number)):
                    link = self._link(f"cgroup {number}", program_id, inode)
                    command = f"bpftool cgroup detach {_word(shown)} {name} id {program_id}"
                    self._add(
                        program_id, f"cgroup {name}", shown, link=link,
                        more=f"number {turn + 1} in turn" if turn else "", idle=idle,
                        detach=_detach_link(link) or command,
                    )  # fmt: skip
            for key, link in list(self._open_links.items()):
                if link.kind == "cgroup" and key[2] == inode:  # such as BPF_LSM_CGROUP
                    del self._open_links[key]
                    self._add(link.program_id, _hook_of(link), shown, link=link, idle=idle)
        finally:
            os.close(fd)

    def maps(self) -> None:
        """Programs that are entries of maps, or run for the sockets in one."""
        deadline = time.monotonic() + _LIMIT_S
        for one in self._now.maps.values():
            if one.kind == "prog_array":
                how = f"tail call by map {one.id}"
                self._reach_all(one.program_ids, one.id, how)
                for user in () if one.elements_complete else self._now.users(one.id):
                    self._unseen[_tail_calls(user.kind)] = (
                        f"not all entries of program array {one.id} were read"
                    )
            elif one.kind in ("devmap", "devmap_hash", "cpumap") and one.value_size == 8:
                with suppress(OSError):
                    ids = self._programs_of_entries(one.id, one.key_size, deadline)
                    self._reach_all(ids, one.id, f"redirect by map {one.id}")
            elif one.kind in ("sockmap", "sockhash") and {"sk_skb", "sk_msg"} & self._present:
                with suppress(OSError):
                    self._sockmap(one.id)

    def _sockmap(self, map_id: int) -> None:
        fd = libbpf.fd_by_id("map", map_id)
        try:
            for number, name in _SOCKMAP_HOOKS:
                for program_id in _answered(fd, number):
                    if any(
                        one.program_id == program_id and one.link_id and one.hook == name
                        for one in self._found
                    ):
                        continue  # its link says the same
                    command = f"bpftool prog detach id {program_id} {name} id {map_id}"
                    self._add(program_id, name, f"map {map_id}", detach=command, map_id=map_id)
        finally:
            libbpf.close(fd)

    def _programs_of_entries(self, map_id: int, key_size: int, deadline: float) -> set[int]:
        """Ids in struct bpf_devmap_val and bpf_cpumap_val: the second four bytes."""
        lib = libbpf.api()
        fd = libbpf.fd_by_id("map", map_id)
        key, value = ctypes.create_string_buffer(key_size), (ctypes.c_uint32 * 2)()
        found: set[int] = set()
        previous = None
        try:
            for _ in range(_MOST_ENTRIES):
                following = ctypes.create_string_buffer(key_size)
                if lib.bpf_map_get_next_key(fd, previous, following) != 0:
                    return found
                if time.monotonic() > deadline:
                    break
                if lib.bpf_map_lookup_elem(fd, following, value) == 0 and value[1]:
                    found.add(value[1])
                key = following
                previous = key
        finally:
            libbpf.close(fd)
        self._unseen[_NETWORK] = f"not all entries of map {map_id} were read"
        return found

    def infrared(self) -> None:
        if "lirc_mode2" not in self._present:
            return
        for path in sorted(Path("/dev").glob("lirc*")):
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    for program_id in _answered(fd, _LIRC_MODE2):
                        command = f"bpftool prog detach id {program_id} lirc_mode2 {path}"
                        self._add(program_id, "lirc_mode2", str(path), detach=command)
                finally:
                    os.close(fd)

    def _reach_all(self, program_ids: Iterable[int], map_id: int, how: str) -> None:
        for caller in self._now.users(map_id):
            for program_id in program_ids:
                self._reach(program_id, caller.id, how)

    def _reach(self, program_id: int, caller: int, how: str) -> None:
        if program_id != caller:
            self._callers.setdefault(program_id, set()).add((caller, how))

    def _link(self, key: str, program_id: int, place: int) -> LinkObject | None:
        return self._open_links.pop((key, program_id, place), None)


@dataclass(frozen=True)
class _Namespace:
    """A network namespace, and how to run a command in it."""

    inode: int
    words: str
    prefix: str

    @classmethod
    def of(cls, inode: int, path: str, now: Objects, *, own: bool) -> _Namespace:
        if own:
            return cls(inode, "", "")
        folder, _, name = path.rpartition("/")
        if folder in ("/run/netns", "/var/run/netns"):
            shown = libbpf.shown(os.fsencode(name))
            return cls(inode, f"netns {shown}", f"ip netns exec {_word(shown)} ")
        shown = libbpf.shown(os.fsencode(path))
        return cls(inode, f"the network namespace {shown}", f"nsenter --net={_word(shown)} ")

    def command(self, words: str) -> str:
        return self.prefix + words


def _iterates(program: ProgramObject) -> bool:
    """Whether a program is an iterator: it is loaded for a function ``bpf_iter_...``."""
    if program.kind != "tracing":
        return False
    return _function(program.attach_btf_id).startswith("bpf_iter_")


def _function(type_id: int) -> str:
    with suppress(Unavailable):
        return btf.kernel_function(type_id)
    return ""


def _tail_calls(kind: str) -> str:
    return f"tail calls of {kind}"


def _answered(target: int, attach_type: int) -> list[int]:
    try:
        return queried(target, attach_type)
    except OSError:
        return []  # this kernel, or this thing, knows no such hook


def _link_key(link: LinkObject) -> str:
    hook = {"xdp": "xdp", "tcx": "dev", "netkit": "dev"}.get(link.kind, link.kind)
    return hook if hook == "xdp" else f"{hook} {_attach_type(link)}"


def _attach_type(link: LinkObject) -> int:
    said = re.match(r"\d+", link.fields.get("attach_type", ""))  # tcx adds the name in brackets
    return int(said[0]) if said else -1


def _hook_of(link: LinkObject) -> str:
    number = _attach_type(link)
    if link.kind == "cgroup":
        return f"cgroup {_HOOK_NAMES.get(number, number)}"
    if link.kind in ("tcx", "netkit", "netns", "tracing", "sockmap") and number in _HOOK_NAMES:
        return _HOOK_NAMES[number]
    return link.kind


def _target_of(link: LinkObject) -> str:
    fields = link.fields
    for name in ("tp_name", "target_name"):
        if name in fields:
            return fields[name]
    if link.kind in ("sockmap", "struct_ops") and "map_id" in fields:
        return f"map {fields['map_id']}"
    if link.kind == "tracing" and "target_btf_id" in fields:
        if name := _function(int(fields["target_btf_id"])):
            return name
        return f"function {fields['target_btf_id']} of BTF {fields.get('target_obj_id', '?')}"
    return link.target


def _detach_link(link: LinkObject | None) -> str:
    """Only some links can be detached while somebody holds them; the rest end with their holder."""
    if link is None:
        return ""
    if link.kind in ("xdp", "tcx", "netkit", "cgroup", "netns", "netfilter", "struct_ops"):
        return f"bpftool link detach id {link.id}"
    if len(link.pins) == 1 and not link.pids:
        return f"rm {_word(link.pins[0])}"
    return ""


def _idle(device: netlink.Device) -> str:
    return "" if device.up else "the device is down"


def _is_empty(folder: str) -> bool:
    """Whether no process is in a cgroup or below it; the root, which has no such file, never is."""
    with suppress(OSError):
        return "populated 0" in Path(folder, "cgroup.events").read_text()
    return False


def _classid(number: int) -> str:
    return (
        f"{number >> 16:x}:{number & 0xFFFF or '':x}" if number & 0xFFFF else f"{number >> 16:x}:"
    )


def _word(shown: str) -> str:
    """A name that `libbpf.shown` has made printable as a word for bash, which reads its escapes."""
    return "$'" + shown.replace("'", "\\'") + "'" if "\\" in shown else shlex.quote(shown)


def _sees_all_processes() -> bool:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE
    return False


def _cgroup_tree() -> tuple[str, bool] | None:
    """The top folder of the cgroups of version 2, and whether it is the root of them all.

    Only the root has no ``cgroup.events`` (kernel/cgroup/cgroup.c, CFTYPE_NOT_ON_ROOT).
    """
    for process, root in (("self", ""), ("1", "/proc/1/root")):
        with suppress(OSError):
            lines = Path(f"/proc/{process}/mountinfo").read_bytes().splitlines()
            for line in lines:
                mount, _, rest = line.partition(b" - ")
                if rest.startswith(b"cgroup2 "):
                    top = root + os.fsdecode(mount_point(mount))
                    return top, not os.path.exists(f"{top}/cgroup.events")
    return None


def _folders(top: str) -> Iterator[str]:
    """A folder and all below it, the upper ones first."""
    waiting = [top]
    while waiting:
        following = []
        for folder in waiting:
            yield folder
            with suppress(OSError), os.scandir(folder) as entries:
                following += [one.path for one in entries if one.is_dir(follow_symlinks=False)]
        waiting = following
