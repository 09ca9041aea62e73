//! T2: a permitted process that becomes another program, and one whose path or cgroup somebody forged.

use std::time::Duration;

use tokio::process::Command;

use crate::cgroups::Cgroups;
use crate::support::counts::reached;
use crate::support::puppet::{ARGUMENTS, Departure, Puppet, copy_program, depart, program};
use crate::support::raw::exchange;
use crate::support::world::{COMMON, DESTINATIONS, World};
use crate::support::{NOBODY, has_program, has_user_namespaces, is_root};

const POLICIES: &str = r#"
@id("root")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == {uid} };
@id("program")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == 65534 && principal.unix has executable && principal.unix.executable == "{program}" };
@id("unit")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has systemd.system_unit && principal.systemd.system_unit == "{unit}" };
"#;

const REQUEST: &str =
    "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";

/// What a shell, which runs as `uid`, is answered once it has become the test's program: the status, which
/// is 200 where the origin saw a request, and else 403.
async fn ask(world: &World, listener: &str, script: &str, uid: Option<u32>) -> u16 {
    let before = world.plain_api.seen().len();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    let puppet = Puppet::start_by(command, &world.target(listener), uid).await;
    let answer = exchange(&mut puppet.connect().await, REQUEST).await;
    let arrived = world.plain_api.seen().len() - before;
    assert_eq!(arrived, usize::from(answer.status == 200), "{answer:#?}");
    answer.status
}

#[tokio::test(flavor = "multi_thread")]
async fn t02_neither_an_exec_nor_a_forged_path_or_cgroup_makes_a_caller_another() {
    let test = "t02_neither_an_exec_nor_a_forged_path_or_cgroup_makes_a_caller_another";
    if !is_root(test) || !has_user_namespaces(test) || !has_program(test, "setpriv") {
        return;
    }
    let Some(mut cgroups) = Cgroups::find() else {
        println!("{test}: needs a cgroup-v2 file system");
        return;
    };
    let mut world = World::servers().await;
    let unit = format!("countersign-t02-{}.service", std::process::id());
    let program = program().to_str().unwrap();
    let policies = POLICIES
        .replace("{program}", program)
        .replace("{unit}", &unit);
    let common = COMMON.replace("  unix: {}\n", "  unix: {}\n  systemd: {}\n");
    world
        .start_agent(&format!("{common}{DESTINATIONS}"), &policies)
        .await;
    let other = world.path("other");
    copy_program(program.as_ref(), &other, "other");
    let (other, arguments) = (other.to_str().unwrap(), ARGUMENTS.join(" "));
    let mounted = format!(
        "exec unshare -Urm sh -c 'mount --bind {other} {program} && exec {program} {arguments}'"
    );
    let mount = cgroups.mount.clone();
    let in_cgroup = |cgroup: &std::path::Path| {
        format!(
            "echo $$ > '{}/cgroup.procs' && exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups {other} {arguments}",
            cgroup.display()
        )
    };
    let real = in_cgroup(&cgroups.make(&mount, format!("system.slice/{unit}")));
    let own = "user.slice/user-65534.slice/user@65534.service";
    let forged = in_cgroup(&cgroups.make(&mount, format!("{own}/system.slice/{unit}")));
    world.good().await;
    let mut refused = 0;
    for listener in ["proxy", "local"] {
        let honest = format!("exec {program} {arguments}");
        assert_eq!(ask(&world, listener, &honest, Some(NOBODY)).await, 200);
        assert_eq!(ask(&world, listener, &real, None).await, 200);

        let before = world.plain_api.seen().len();
        let target = world.target(listener);
        let steps = [(REQUEST, "")];
        let (exec, silence) = (Departure::Exec, Duration::from_secs(30));
        let departed = depart(exec, &target, Some(NOBODY), &steps, REQUEST, silence).await;
        assert!(departed.before.contains("\"verified\""), "{departed:#?}");
        assert!(!departed.after.contains("\"verified\""), "{departed:#?}");
        assert_eq!(world.plain_api.seen().len(), before + 1, "{departed:#?}");
        assert_eq!(ask(&world, listener, &mounted, Some(NOBODY)).await, 403);
        assert_eq!(ask(&world, listener, &forged, None).await, 403);
        refused += 3;
    }
    world.good().await;
    reached("taken_for_nobody_else", refused);
}
