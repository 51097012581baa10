//! Identifies the container of a process from the text of its `/proc/PID/cgroup`.
//!
//! Each container runtime creates a control group for each container and puts the container's id into the
//! group's name. There is no standard for these names. The patterns here are those of Docker, containerd,
//! nerdctl, CRI-O, Podman, BuildKit, LXC, systemd-nspawn, Amazon ECS, Garden and Mesos, with systemd as the
//! cgroup driver and with cgroupfs.

/// The part before the id in the name of a control group: `docker-ID.scope`, `libpod-ID`.
const RUNTIMES: [&str; 8] =
    ["docker", "cri-containerd", "crio", "libpod", "podman", "containerd", "nerdctl", "buildkit"];

/// The id of the innermost container that a process is in, as its runtime prints it at full length; for LXC
/// and systemd-nspawn, which have no ids, the container's name. `None` if the process is in no container, or
/// if the container's control groups are not visible from this control group namespace (`0::/`).
///
/// `cgroup` is the content of `/proc/PID/cgroup`: a line `number:controllers:path` for each hierarchy, with
/// cgroup v1, v2 or both.
pub fn id(cgroup: &str) -> Option<String> {
    let paths = || cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2).map(|path| (line, path)));
    // On a hybrid system the runtime may use either; if both name a container, the unified hierarchy is
    // right.
    let unified = paths().filter(|(line, _)| line.starts_with("0::"));
    let others = paths().filter(|(line, _)| !line.starts_with("0::"));
    unified.chain(others).find_map(|(_, path)| id_in(path)).map(str::to_owned)
}

/// The innermost container in one path.
fn id_in(path: &str) -> Option<&str> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    // The monitor of a container in a pod: `/libpod_parent/POD/conmon`. Otherwise the pod's id would be taken
    // for a container's.
    if segments.last() == Some(&"conmon") {
        return None;
    }
    (0..segments.len()).rev().find_map(|index| segment_id(segments[index], &segments[..index]))
}

/// The id in one segment of a path, if that is a container's group; `above` are the segments before it.
fn segment_id<'a>(segment: &'a str, above: &[&str]) -> Option<&'a str> {
    if let Some(name) = segment.strip_prefix("lxc.payload.") {
        return (!name.is_empty()).then_some(name);
    }
    if let Some(name) = segment.strip_prefix("systemd-nspawn@").and_then(|rest| rest.strip_suffix(".service"))
    {
        return (!name.is_empty()).then_some(name);
    }
    match above.last() {
        Some(&("lxc" | "lxc.payload")) => return Some(segment),
        Some(&("garden" | "mesos")) if is_uuid(segment) => return Some(segment),
        Some(&"buildkit") if is_buildkit_id(segment) => return Some(segment),
        _ => {}
    }
    // The form of a systemd driver on a host without systemd: `kubepods-podUID.slice:cri-containerd:ID`.
    if let Some((before, id)) = segment.rsplit_once(':') {
        let runtime = before.rsplit(':').next()?;
        return is_named(runtime, id).then_some(id);
    }
    let name = segment.strip_suffix(".scope").unwrap_or(segment);
    if let Some((runtime, id)) = name.rsplit_once('-')
        && is_named(runtime, id)
    {
        // The runtime of `libpod-conmon-ID`, the monitor outside the container, is not in the list.
        return Some(id);
    }
    if above.contains(&"ecs") && is_fargate_id(segment) {
        return Some(segment);
    }
    // A name of 64 hexadecimal digits is an id in any place. A shorter one is an id only below the group of a
    // runtime.
    let runtime_above = || {
        above.iter().any(|name| {
            RUNTIMES.contains(name) || name.starts_with("kubepods") || name.starts_with("libpod_parent")
        })
    };
    (is_id(segment) && (segment.len() == 64 || runtime_above())).then_some(segment)
}

/// Whether containers of `runtime` have names that end with such an id.
fn is_named(runtime: &str, id: &str) -> bool {
    // dockerd runs BuildKit's containers under its own name.
    let is_build = matches!(runtime, "docker" | "buildkit") && is_buildkit_id(id);
    RUNTIMES.contains(&runtime) && (is_id(id) || is_build)
}

/// Whether this is an id as engines for containers choose them at random.
pub(super) fn is_id(text: &str) -> bool {
    (32..=64).contains(&text.len()) && text.bytes().all(is_hex_digit)
}

fn is_hex_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

/// BuildKit writes 128 random bits in base 36.
///
/// <https://github.com/moby/buildkit/blob/v0.16.0/identity/randomid.go>
fn is_buildkit_id(text: &str) -> bool {
    text.len() == 25 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'z'))
}

/// Groups of hexadecimal digits: a UUID, or Garden's `6f265890-5165-7fab-6b52-18d1`.
fn is_uuid(text: &str) -> bool {
    let mut groups = text.split('-');
    let first = groups.next().is_some_and(|group| group.len() == 8);
    first && text.len() >= 28 && text.bytes().all(|byte| byte == b'-' || is_hex_digit(byte))
}

/// The task's id and a number: `34dc0b5e626f2c5c4c5170e34b10e765-1234567890`.
fn is_fargate_id(text: &str) -> bool {
    text.split_once('-').is_some_and(|(task, number)| {
        task.len() == 32
            && task.bytes().all(is_hex_digit)
            && !number.is_empty()
            && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "3f4ac1b2d5e6f70819283746556473829100aabbccddeeff0011223344556677";
    const B: &str = "b0000000000000000000000000000000000000000000000000000000000000b1";
    const BUILD: &str = "w5oe7fwrhqh4yryb4qrw5ypcc";
    const SHORT: &str = "0123456789abcdef0123456789abcdef";

    const POD: &str = "pod8a1c2a4e-1111-2222-3333-444455556666";
    const SLICE: &str = "kubepods-burstable-pod8a1c2a4e_1111_2222_3333_444455556666.slice";

    fn check(cases: &[(&str, String, Option<&str>)]) {
        for (name, text, expected) in cases {
            assert_eq!(id(text).as_deref(), *expected, "{name}: {text}");
        }
    }

    #[test]
    fn finds_the_container() {
        check(&[
            ("docker, v2, systemd", format!("0::/system.slice/docker-{A}.scope\n"), Some(A)),
            ("docker, v2, cgroupfs", format!("0::/docker/{A}\n"), Some(A)),
            ("docker with a parent of its own", format!("0::/docker/buildx/{A}\n"), Some(A)),
            ("docker, v1", format!("12:memory:/docker/{A}\n1:name=systemd:/docker/{A}\n"), Some(A)),
            (
                "docker, hybrid",
                format!("4:cpu,cpuacct:/docker/{A}\n0::/system.slice/containerd.service\n"),
                Some(A),
            ),
            (
                "docker, rootless",
                format!("0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{A}.scope\n"),
                Some(A),
            ),
            ("podman", format!("0::/machine.slice/libpod-{A}.scope/container\n"), Some(A)),
            (
                "podman, cgroupfs",
                format!("9:pids:/libpod_parent/libpod-{A}\n0::/libpod_parent/libpod-{A}\n"),
                Some(A),
            ),
            ("podman, cgroupfs, crun", format!("0::/libpod_parent/libpod-{A}/ctr\n"), Some(A)),
            ("podman's pod, cgroupfs", format!("0::/libpod_parent/{B}/libpod-{A}\n"), Some(A)),
            (
                "podman's pod, rootless",
                format!(
                    "0::/user.slice/user-1000.slice/user@1000.service/user.slice/user-libpod_pod_{B}.slice/\
                     libpod-{A}.scope/container\n"
                ),
                Some(A),
            ),
            ("nerdctl, cgroupfs", format!("0::/default/{A}\n"), Some(A)),
            (
                "nerdctl, rootless",
                format!("0::/user.slice/user-1000.slice/user@1000.service/user.slice/nerdctl-{A}.scope\n"),
                Some(A),
            ),
            ("buildkit", "0::/buildkit/w5oe7fwrhqh4yryb4qrw5ypcc\n".into(), Some(BUILD)),
            ("buildkit in docker", format!("0::/system.slice/docker-{BUILD}.scope\n"), Some(BUILD)),
            ("buildkit in docker, v1", format!("7:cpu:/docker/buildkit/{BUILD}\n"), Some(BUILD)),
            ("buildkit, mixed up", format!("0::/system.slice:docker:{BUILD}\n"), Some(BUILD)),
            ("buildkit's worker in a container", format!("0::/docker/{A}/buildkit/{BUILD}\n"), Some(BUILD)),
            ("a parent of one's own", format!("0::/actions_job/{A}\n"), Some(A)),
            (
                "Fargate",
                "9:pids:/ecs/34dc0b5e626f2c5c4c5170e34b10e765/34dc0b5e626f2c5c4c5170e34b10e765-1234567890\n"
                    .into(),
                Some("34dc0b5e626f2c5c4c5170e34b10e765-1234567890"),
            ),
            (
                "Garden",
                "1:name=systemd:/garden/6f265890-5165-7fab-6b52-18d1\n".into(),
                Some("6f265890-5165-7fab-6b52-18d1"),
            ),
            (
                "Mesos",
                "5:cpu:/mesos/9d4537d9-8c02-40bb-a5ec-9c5b2b9b0c37\n".into(),
                Some("9d4537d9-8c02-40bb-a5ec-9c5b2b9b0c37"),
            ),
            ("LXC, v1 with namespaces", "3:memory:/lxc.payload/web-1\n".into(), Some("web-1")),
            ("LXC in LXC", "0::/lxc.payload.outer/lxc.payload.inner/init.scope\n".into(), Some("inner")),
            (
                "systemd-nspawn",
                "0::/machine.slice/systemd-nspawn@web.service/payload/init.scope\n".into(),
                Some("web"),
            ),
            ("nerdctl", format!("0::/system.slice/nerdctl-{A}.scope\n"), Some(A)),
            ("ECS", format!("9:pids:/ecs/0123-task/{A}\n"), Some(A)),
            ("LXC", "0::/lxc.payload.web-1/system.slice/nginx.service\n".into(), Some("web-1")),
            ("LXC, v1", "3:memory:/lxc/web-1\n".into(), Some("web-1")),
            ("systemd in a container", format!("0::/docker/{A}/system.slice/nginx.service\n"), Some(A)),
            (
                "a container in a container",
                format!("0::/docker/{A}/kubelet.slice/docker-{B}.scope\n"),
                Some(B),
            ),
        ]);
    }

    #[test]
    fn finds_the_container_in_kubernetes() {
        check(&[
            (
                "containerd, systemd",
                format!("0::/kubepods.slice/{SLICE}/cri-containerd-{A}.scope\n"),
                Some(A),
            ),
            ("containerd, cgroupfs", format!("0::/kubepods/burstable/{POD}/{A}\n"), Some(A)),
            (
                "containerd, mixed up",
                format!("11:cpu:/system.slice/containerd.service/{SLICE}:cri-containerd:{A}\n"),
                Some(A),
            ),
            ("containerd, short id", format!("0::/kubepods/besteffort/{POD}/{SHORT}\n"), Some(SHORT)),
            ("CRI-O", format!("0::/kubepods.slice/{SLICE}/crio-{A}.scope\n"), Some(A)),
            ("CRI-O, crun", format!("0::/kubepods.slice/{SLICE}/crio-{A}.scope/container\n"), Some(A)),
            ("minikube", format!("0::/docker/{B}/kubelet/kubepods/burstable/{POD}/{A}\n"), Some(A)),
            (
                "kind",
                format!(
                    "0::/system.slice/docker-{B}.scope/kubelet.slice/kubelet-kubepods.slice/\
                     kubelet-kubepods-{POD}.slice/cri-containerd-{A}.scope\n"
                ),
                Some(A),
            ),
            ("k3s, cgroupfs, v1", format!("3:memory:/kubepods/besteffort/{POD}/{A}\n"), Some(A)),
            (
                "kubelet with docker, systemd",
                format!("1:name=systemd:/kubepods.slice/{SLICE}/docker-{A}.scope\n"),
                Some(A),
            ),
            ("CRI-O, cgroupfs", format!("0::/kubepods/burstable/{POD}/crio-{A}\n"), Some(A)),
            ("seen from a sibling's namespace", format!("0::/../../kubepods/{POD}/{A}\n"), Some(A)),
        ]);
    }

    #[test]
    fn is_not_fooled() {
        check(&[
            ("podman's pod, monitor", format!("0::/libpod_parent/{B}/conmon\n"), None),
            ("podman's monitor, cgroupfs", "0::/libpod_parent/conmon\n".into(), None),
            ("podman's pod, its slice", format!("0::/machine.slice/machine-libpod_pod_{B}.slice\n"), None),
            (
                "podman, not in a container",
                "0::/user.slice/user-1000.slice/user@1000.service/user.slice/podman-239302.scope\n".into(),
                None,
            ),
            ("CRI-O's monitor, cgroupfs", format!("0::/kubepods/burstable/{POD}/crio-conmon-{A}\n"), None),
            ("a pod's slice", format!("0::/kubepods.slice/{SLICE}\n"), None),
            ("LXC's monitor, v1", "3:memory:/lxc.monitor/web-1\n".into(), None),
            ("CRI-O's monitor", format!("0::/kubepods.slice/{SLICE}/crio-conmon-{A}.scope\n"), None),
            ("podman's monitor", format!("0::/machine.slice/libpod-conmon-{A}.scope\n"), None),
            ("LXC's monitor", "0::/lxc.monitor.web-1\n".into(), None),
            ("the engine itself", "0::/system.slice/docker.service\n".into(), None),
            ("a service", "0::/system.slice/nginx.service\n".into(), None),
            ("a session", "0::/user.slice/user-1000.slice/session-3.scope\n".into(), None),
            ("a scope with hex in its name", format!("0::/user.slice/run-{SHORT}.scope\n"), None),
            ("a virtual machine", "0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope\n".into(), None),
            ("a group with hex for a name", format!("0::/system.slice/{SHORT}\n"), None),
            ("upper case", format!("0::/docker/{}\n", A.to_uppercase()), None),
            ("too long", format!("0::/docker/{A}0\n"), None),
            ("a private namespace", "0::/\n".into(), None),
            ("nothing", String::new(), None),
            ("nonsense", "::::\n0:\n-\n/docker/\n".into(), None),
        ]);
    }
}
