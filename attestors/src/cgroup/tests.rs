//! `/proc/PID/cgroup` as it is met, and as an attacker would have it. To add a fixture: a line.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use proptest::prelude::*;

use super::*;
use crate::counts;

const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const B: &str = "b1b2b3b4b5b6b7b8b9b0b1b2b3b4b5b6b7b8b9b0b1b2b3b4b5b6b7b8b9b0b1b2";
const POD: &str = "12345678-1234-1234-1234-123456789abc";
const POD_: &str = "12345678_1234_1234_1234_123456789abc";

/// Lines of the file (`|` between them, `A`, `B`, `POD` and `POD_` in braces, U+FFFD for a byte that is
/// not UTF-8), the container, the system unit, the user unit; `-` for none.
type Fixture = (&'static str, &'static str, &'static str, &'static str);

/// What runtimes and systemd really make.
const ORDINARY: [Fixture; 50] = [
    // cgroup v2, systemd
    ("0::/", "-", "-", "-"),
    ("0::/init.scope", "-", "init.scope", "-"),
    (
        "0::/system.slice/orders.service",
        "-",
        "orders.service",
        "-",
    ),
    (
        "0::/system.slice/system-getty.slice/getty@tty1.service",
        "-",
        "getty@tty1.service",
        "-",
    ),
    (
        "0::/system.slice/orders.service/worker",
        "-",
        "orders.service",
        "-",
    ),
    ("0::/system.slice/dbus.socket", "-", "dbus.socket", "-"),
    ("0::/system.slice/dev-sda2.swap", "-", "dev-sda2.swap", "-"),
    (
        "0::/system.slice/a\\x2db.service",
        "-",
        "a\\x2db.service",
        "-",
    ),
    (
        "0::/orders.slice/orders-api.slice/orders-api-v1.slice/api.service",
        "-",
        "api.service",
        "-",
    ),
    (
        "0::/user.slice/user-1000.slice/session-3.scope",
        "-",
        "session-3.scope",
        "-",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/init.scope",
        "-",
        "user@1000.service",
        "init.scope",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/vim.service",
        "-",
        "user@1000.service",
        "vim.service",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome.slice/app-gnome-x-1.scope",
        "-",
        "user@1000.service",
        "app-gnome-x-1.scope",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice",
        "-",
        "user@1000.service",
        "-",
    ),
    (
        "0::/machine.slice/machine-web.scope/payload",
        "-",
        "machine-web.scope",
        "-",
    ),
    // cgroup v2, containers by the systemd driver
    (
        "0::/system.slice/docker-{A}.scope",
        "docker:A",
        "docker-{A}.scope",
        "-",
    ),
    (
        "0::/system.slice/docker-{A}.scope/init",
        "docker:A",
        "docker-{A}.scope",
        "-",
    ),
    (
        "0::/system.slice/nerdctl-{A}.scope",
        "containerd:A",
        "nerdctl-{A}.scope",
        "-",
    ),
    (
        "0::/machine.slice/libpod-{A}.scope",
        "podman:A",
        "libpod-{A}.scope",
        "-",
    ),
    (
        "0::/machine.slice/libpod-{A}.scope/container",
        "podman:A",
        "libpod-{A}.scope",
        "-",
    ),
    (
        "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice/cri-containerd-{A}.scope",
        "containerd:A",
        "cri-containerd-{A}.scope",
        "-",
    ),
    (
        "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{POD_}.slice/crio-{A}.scope",
        "cri-o:A",
        "crio-{A}.scope",
        "-",
    ),
    (
        "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{POD_}.slice/crio-{A}.scope/container",
        "cri-o:A",
        "crio-{A}.scope",
        "-",
    ),
    (
        "0::/kubepods.slice/kubepods-pod{POD_}.slice/docker-{A}.scope",
        "docker:A",
        "docker-{A}.scope",
        "-",
    ),
    (
        "0::/kubepods.slice/kubepods-pod0123456789abcdef0123456789abcdef.slice/cri-containerd-{A}.scope",
        "containerd:A",
        "cri-containerd-{A}.scope",
        "-",
    ),
    // cgroup v2, containers by the cgroupfs driver
    ("0::/docker/{A}", "docker:A", "-", "-"),
    ("0::/docker/{A}/init.scope", "docker:A", "-", "-"),
    ("0::/libpod_parent/libpod-{A}", "podman:A", "-", "-"),
    ("0::/kubepods/burstable/pod{POD}/{A}", "?:A", "-", "-"),
    ("0::/kubepods/besteffort/pod{POD}/{A}", "?:A", "-", "-"),
    ("0::/kubepods/pod{POD}/{A}", "?:A", "-", "-"),
    (
        "0::/kubepods/burstable/pod{POD}/crio-{A}",
        "cri-o:A",
        "-",
        "-",
    ),
    // monitors and pods are not containers
    (
        "0::/machine.slice/libpod-conmon-{A}.scope",
        "-",
        "libpod-conmon-{A}.scope",
        "-",
    ),
    (
        "0::/kubepods.slice/kubepods-pod{POD_}.slice/crio-conmon-{A}.scope",
        "-",
        "crio-conmon-{A}.scope",
        "-",
    ),
    ("0::/kubepods/burstable/pod{POD}", "-", "-", "-"),
    ("0::/kubepods.slice/kubepods-pod{POD_}.slice", "-", "-", "-"),
    // nested: what the outer container made of its inside stays its own
    ("0::/docker/{A}/docker/{B}", "docker:A", "-", "-"),
    (
        "0::/docker/{A}/kubelet/kubepods/burstable/pod{POD}/{B}",
        "docker:A",
        "-",
        "-",
    ),
    (
        "0::/system.slice/docker-{A}.scope/system.slice/docker-{B}.scope",
        "docker:A",
        "docker-{A}.scope",
        "-",
    ),
    ("0::/kubepods/pod{POD}/{A}/docker/{B}", "?:A", "-", "-"),
    // cgroup v1 and hybrid
    (
        "1:name=systemd:/system.slice/orders.service|2:memory:/system.slice/orders.service",
        "-",
        "orders.service",
        "-",
    ),
    (
        "1:name=systemd:/system.slice/orders.service|0::/",
        "-",
        "orders.service",
        "-",
    ),
    (
        "1:name=systemd:/user.slice/user-1000.slice/user@1000.service/app.slice/vim.service|0::/user.slice/user-1000.slice/user@1000.service/app.slice/vim.service",
        "-",
        "user@1000.service",
        "vim.service",
    ),
    (
        "12:pids:/docker/{A}|11:memory:/docker/{A}|1:name=systemd:/docker/{A}|0::/",
        "docker:A",
        "-",
        "-",
    ),
    (
        "5:cpu,cpuacct:/docker/{A}|1:name=systemd:/docker/{A}|0::/system.slice/containerd.service",
        "docker:A",
        "-",
        "-",
    ),
    (
        "11:memory:/kubepods/burstable/pod{POD}/{A}|1:name=systemd:/kubepods/burstable/pod{POD}/{A}",
        "?:A",
        "-",
        "-",
    ),
    (
        "4:devices:/kubepods.slice/kubepods-pod{POD_}.slice/cri-containerd-{A}.scope|1:name=systemd:/kubepods.slice/kubepods-pod{POD_}.slice/cri-containerd-{A}.scope",
        "containerd:A",
        "cri-containerd-{A}.scope",
        "-",
    ),
    ("3:cpuset:/|2:memory:/process_api/1|0::/", "-", "-", "-"),
    (
        "8:memory:/system.slice/docker-{A}.scope|1:name=systemd:/system.slice/docker-{A}.scope|0::/system.slice/docker-{A}.scope",
        "docker:A",
        "docker-{A}.scope",
        "-",
    ),
    (
        "7:net_cls,net_prio:/machine.slice/libpod-{A}.scope|1:name=systemd:/machine.slice/libpod-{A}.scope",
        "podman:A",
        "libpod-{A}.scope",
        "-",
    ),
];

/// What somebody without root can have made below what is delegated, or would like to be read as.
const HOSTILE: [Fixture; 57] = [
    // below a user's own manager
    (
        "0::/user.slice/user-1000.slice/user@1000.service/system.slice/orders.service",
        "-",
        "user@1000.service",
        "orders.service",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/orders.service",
        "-",
        "user@1000.service",
        "orders.service",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/docker/{A}",
        "-",
        "user@1000.service",
        "-",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/docker-{A}.scope",
        "-",
        "user@1000.service",
        "docker-{A}.scope",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope/container",
        "-",
        "user@1000.service",
        "libpod-{A}.scope",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/kubepods/pod{POD}/{A}",
        "-",
        "user@1000.service",
        "-",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod{POD_}.slice/cri-containerd-{A}.scope",
        "-",
        "user@1000.service",
        "cri-containerd-{A}.scope",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/user.slice/user-0.slice/user@0.service/a.service",
        "-",
        "user@1000.service",
        "user@0.service",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/machine.slice/libpod-{A}.scope",
        "-",
        "user@1000.service",
        "libpod-{A}.scope",
    ),
    (
        "1:name=systemd:/user.slice/user-1000.slice/user@1000.service/system.slice/docker-{A}.scope|0::/",
        "-",
        "user@1000.service",
        "docker-{A}.scope",
    ),
    // below a delegated unit
    (
        "0::/system.slice/build.service/system.slice/orders.service",
        "-",
        "build.service",
        "-",
    ),
    (
        "0::/system.slice/build.service/docker/{A}",
        "-",
        "build.service",
        "-",
    ),
    (
        "0::/system.slice/build.service/kubepods/pod{POD}/{A}",
        "-",
        "build.service",
        "-",
    ),
    (
        "0::/system.slice/build.service/docker-{A}.scope",
        "-",
        "build.service",
        "-",
    ),
    (
        "0::/system.slice/build.service/user.slice/user-0.slice/user@0.service/x.service",
        "-",
        "build.service",
        "-",
    ),
    // below what is owned, to be taken for nothing
    (
        "0::/system.slice/build.service/x (deleted)",
        "-",
        "build.service",
        "-",
    ),
    (
        "0::/system.slice/build.service/x\u{fffd}",
        "-",
        "build.service",
        "-",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/vim.service (deleted)",
        "-",
        "user@1000.service",
        "-",
    ),
    (
        "0::/user.slice/user-1000.slice/user@1000.service/vim\u{fffd}.service",
        "-",
        "user@1000.service",
        "-",
    ),
    (
        "1:name=systemd:/system.slice/build.service/x (deleted)|0::/",
        "-",
        "build.service",
        "-",
    ),
    ("0::/docker/{A}/x (deleted)", "docker:A", "-", "-"),
    (
        "0::/system.slice/docker-{A}.scope/x\u{fffd}",
        "docker:A",
        "docker-{A}.scope",
        "-",
    ),
    // below a container
    (
        "0::/docker/{A}/system.slice/orders.service",
        "docker:A",
        "-",
        "-",
    ),
    (
        "0::/system.slice/docker-{A}.scope/system.slice/orders.service",
        "docker:A",
        "docker-{A}.scope",
        "-",
    ),
    (
        "0::/machine.slice/libpod-{A}.scope/container/machine.slice/libpod-{B}.scope",
        "podman:A",
        "libpod-{A}.scope",
        "-",
    ),
    (
        "0::/kubepods/pod{POD}/{A}/kubepods/pod{POD}/{B}",
        "?:A",
        "-",
        "-",
    ),
    // somewhere else that merely sounds like it
    ("0::/x/docker/{A}", "-", "-", "-"),
    ("0::/x/system.slice/orders.service", "-", "-", "-"),
    ("0::/x/kubepods/pod{POD}/{A}", "-", "-", "-"),
    ("0::/docker-{A}.scope", "-", "docker-{A}.scope", "-"),
    (
        "0::/user.slice/docker-{A}.scope",
        "-",
        "docker-{A}.scope",
        "-",
    ),
    (
        "0::/evil.slice/docker-{A}.scope",
        "-",
        "docker-{A}.scope",
        "-",
    ),
    (
        "0::/system.slice/machine.slice/libpod-{A}.scope",
        "-",
        "-",
        "-",
    ),
    (
        "0::/evil.slice/kubepods-pod{POD_}.slice/cri-containerd-{A}.scope",
        "-",
        "-",
        "-",
    ),
    (
        "0::/user.slice/user-1000.slice/user@0.service/x.service",
        "-",
        "user@0.service",
        "-",
    ),
    (
        "0::/user.slice/user@1000.service/x.service",
        "-",
        "user@1000.service",
        "-",
    ),
    (
        "0::/system.slice/user@1000.service/x.service",
        "-",
        "user@1000.service",
        "-",
    ),
    // names that are nearly right
    ("0::/docker/{A}0", "-", "-", "-"),
    (
        "0::/docker/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "-",
        "-",
        "-",
    ),
    ("0::/docker/buildx", "-", "-", "-"),
    ("0::/system.slice/docker-{A}", "-", "-", "-"),
    ("0::/system.slice/docker-{A}.scope.d", "-", "-", "-"),
    ("0::/docker/{A}\u{fffd}", "-", "-", "-"),
    ("0::/system.slice/orders\u{fffd}.service", "-", "-", "-"),
    ("0::/system.slice/orders.service\u{fffd}", "-", "-", "-"),
    ("0::/system\u{fffd}.slice/orders.service", "-", "-", "-"),
    ("0::/kubepods/pod../{A}", "-", "-", "-"),
    ("0::/kubepods/podx/{A}", "-", "-", "-"),
    ("0::/kubepods/guaranteed/pod{POD}/{A}", "-", "-", "-"),
    ("0::/system.slice/ orders.service", "-", "-", "-"),
    ("0::/system.slice/.service", "-", "-", "-"),
    // paths that lead elsewhere, and files that are not what they should be
    ("0::/../../system.slice/orders.service", "-", "-", "-"),
    (
        "0::/system.slice/../system.slice/orders.service",
        "-",
        "-",
        "-",
    ),
    ("0::/system.slice//orders.service", "-", "-", "-"),
    ("0::/system.slice/orders.service (deleted)", "-", "-", "-"),
    ("0::/docker/{A} (deleted)", "-", "-", "-"),
    ("0::system.slice/orders.service", "-", "-", "-"),
];

fn spell(text: &str) -> String {
    text.replace('|', "\n")
        .replace("{A}", A)
        .replace("{B}", B)
        .replace("{POD}", POD)
        .replace("{POD_}", POD_)
}

fn read(text: &str) -> Cgroups {
    let parts: Vec<&[u8]> = text.split('\u{fffd}').map(str::as_bytes).collect();
    Cgroups::read(&parts.join(&0xff))
}

fn container_in_words(cgroups: Cgroups) -> String {
    match cgroups.container {
        Ok(None) => "-".to_owned(),
        Ok(Some(container)) => {
            let id = container.id.replace(A, "A").replace(B, "B");
            let runtime = container
                .runtime
                .map_or("?".to_owned(), |runtime| runtime.to_string());
            format!("{runtime}:{id}")
        }
        Err(Contradiction) => "contradiction".to_owned(),
    }
}

#[test]
fn every_fixture_is_read_as_written_down() {
    for (file, container, system_unit, user_unit) in ORDINARY.iter().chain(&HOSTILE) {
        let cgroups = read(&spell(file));
        assert_eq!(
            cgroups.units.system.as_deref().unwrap_or("-"),
            spell(system_unit),
            "system unit of {file}"
        );
        assert_eq!(
            cgroups.units.user.as_deref().unwrap_or("-"),
            spell(user_unit),
            "user unit of {file}"
        );
        assert_eq!(
            container_in_words(cgroups),
            *container,
            "container of {file}"
        );
    }
    counts::expect("cgroup-fixtures", ORDINARY.len() + HOSTILE.len());
    counts::expect("cgroup-fixtures-hostile", HOSTILE.len());
}

#[test]
fn hierarchies_that_disagree_are_not_believed() {
    for file in [
        "2:memory:/docker/{A}|1:name=systemd:/docker/{B}",
        "2:memory:/docker/{A}|0::/system.slice/docker-{B}.scope",
        "2:memory:/docker/{A}|0::/machine.slice/libpod-{A}.scope",
    ] {
        let container = container_in_words(read(&spell(file)));
        assert_eq!(container, "contradiction", "{file}");
    }
}

#[test]
fn the_path_is_that_of_the_hierarchy_in_use() {
    for (file, path) in [
        ("0::/a.slice", Some("/a.slice")),
        ("1:name=systemd:/a.slice\n0::/", Some("/a.slice")),
        ("1:name=systemd:/a.slice\n0::/b.slice", Some("/b.slice")),
        ("2:memory:/a\n1:name=systemd:/b:c", Some("/b:c")),
        ("0::/a.service/x\u{fffd}", Some("/a.service/x\u{fffd}")),
        ("0::/a.service (deleted)", Some("/a.service (deleted)")),
        ("2:memory:/a", None),
        ("", None),
    ] {
        assert_eq!(read(file).path.as_deref(), path, "{file}");
    }
}

/// Directory names as a user would choose them.
fn tempting() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("docker".to_owned()),
        Just("kubepods".to_owned()),
        Just("kubepods.slice".to_owned()),
        Just("system.slice".to_owned()),
        Just("machine.slice".to_owned()),
        Just("user.slice".to_owned()),
        Just(format!("pod{POD}")),
        Just(format!("kubepods-pod{POD_}.slice")),
        Just(B.to_owned()),
        Just(format!("docker-{B}.scope")),
        Just(format!("cri-containerd-{B}.scope")),
        Just("orders.service".to_owned()),
        Just("user@0.service".to_owned()),
        Just("x (deleted)".to_owned()),
        Just("x\u{fffd}".to_owned()),
        "[^\n/]{1,20}",
    ]
}

proptest! {
    /// What a user owns stays the user's, whatever the directories below are called.
    #[test]
    fn below_what_is_delegated_no_name_counts(names in prop::collection::vec(tempting(), 0..6)) {
        let below = names.join("/");
        // No directory can have these names: a path with them says nothing at all.
        let leads_elsewhere = names.iter().any(|name| matches!(name.as_str(), "." | ".."));
        for (owned, container, unit) in [
            ("/user.slice/user-1000.slice/user@1000.service", "-".to_owned(), "user@1000.service".to_owned()),
            ("/system.slice/build.service", "-".to_owned(), "build.service".to_owned()),
            (&format!("/docker/{A}"), "docker:A".to_owned(), "-".to_owned()),
        ] {
            let file = format!("0::{owned}/{below}");
            let mut cgroups = read(file.trim_end_matches('/'));
            let system = cgroups.units.system.take().unwrap_or("-".to_owned());
            let told = (container_in_words(cgroups), system);
            let expected = match leads_elsewhere {
                true => ("-".to_owned(), "-".to_owned()),
                false => (container, unit),
            };
            prop_assert_eq!(told, expected, "{}", file);
        }
    }

    #[test]
    fn no_file_makes_it_panic(file in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Cgroups::read(&file);
    }
}
