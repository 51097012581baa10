//! Finds the container of a process in the text of its `/proc/PID/cgroup`.
//!
//! Runtimes put each container in a control group of its own and write the container's id into its name.
//! There is no standard for that, so what is known here is what Docker, containerd, CRI-O, Podman and LXC do,
//! with systemd's cgroup driver and without.

/// What comes before the id in the name of a systemd scope.
const SCOPES: [&str; 7] = ["docker", "cri-containerd", "crio", "libpod", "podman", "containerd", "nerdctl"];

/// The id of the innermost container that a process is in, as its runtime prints it at full length; for LXC,
/// which has no ids, the container's name. `None` if it is in none, and also if it is in one whose control
/// groups cannot be seen from here (`0::/`).
///
/// `cgroup` is the content of `/proc/PID/cgroup`: a line `number:controllers:path` for each hierarchy, with
/// cgroup v1, v2 or both.
pub fn id(cgroup: &str) -> Option<String> {
    let paths = || cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2).map(|path| (line, path)));
    // On a hybrid system either may be the one that the runtime uses; the unified one is right where both
    // are.
    let unified = paths().filter(|(line, _)| line.starts_with("0::"));
    let others = paths().filter(|(line, _)| !line.starts_with("0::"));
    unified.chain(others).find_map(|(_, path)| id_in(path))
}

/// The innermost container in one path.
fn id_in(path: &str) -> Option<String> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    (0..segments.len()).rev().find_map(|index| {
        let parent = index.checked_sub(1).and_then(|before| segments.get(before)).copied();
        segment_id(segments[index], parent, &segments[..index]).map(str::to_owned)
    })
}

fn segment_id<'a>(segment: &'a str, parent: Option<&str>, above: &[&str]) -> Option<&'a str> {
    if let Some(name) = segment.strip_prefix("lxc.payload.") {
        return (!name.is_empty()).then_some(name);
    }
    if matches!(parent, Some("lxc" | "lxc.payload")) {
        return Some(segment);
    }
    if let Some(scope) = segment.strip_suffix(".scope") {
        // `libpod-conmon-ID.scope` is the monitor outside the container: its prefix is not in the list.
        let (runtime, id) = scope.rsplit_once('-')?;
        return (SCOPES.contains(&runtime) && is_id(id)).then_some(id);
    }
    // containerd told to use systemd's names without systemd: `kubepods-podUID.slice:cri-containerd:ID`.
    if let Some((before, id)) = segment.rsplit_once(':') {
        let runtime = before.rsplit(':').next()?;
        return (SCOPES.contains(&runtime) && is_id(id)).then_some(id);
    }
    // Sixty-four digits are an id wherever they are; fewer could be anything's, unless a runtime's group is
    // above.
    let runtime_above = || {
        above.iter().any(|name| {
            SCOPES.contains(name) || name.starts_with("kubepods") || name.starts_with("libpod_parent")
        })
    };
    (is_id(segment) && (segment.len() == 64 || runtime_above())).then_some(segment)
}

fn is_id(text: &str) -> bool {
    (32..=64).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "3f4ac1b2d5e6f70819283746556473829100aabbccddeeff0011223344556677";
    const B: &str = "b0000000000000000000000000000000000000000000000000000000000000b1";
    const SHORT: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn finds_the_container() {
        let pod = "pod8a1c2a4e-1111-2222-3333-444455556666";
        let slice = "kubepods-burstable-pod8a1c2a4e_1111_2222_3333_444455556666.slice";
        let cases = [
            ("docker, v2, systemd", format!("0::/system.slice/docker-{A}.scope\n"), Some(A)),
            ("docker, v2, cgroupfs", format!("0::/docker/{A}\n"), Some(A)),
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
            (
                "containerd, systemd",
                format!("0::/kubepods.slice/{slice}/cri-containerd-{A}.scope\n"),
                Some(A),
            ),
            ("containerd, cgroupfs", format!("0::/kubepods/burstable/{pod}/{A}\n"), Some(A)),
            (
                "containerd, mixed up",
                format!("11:cpu:/system.slice/containerd.service/{slice}:cri-containerd:{A}\n"),
                Some(A),
            ),
            ("containerd, short id", format!("0::/kubepods/besteffort/{pod}/{SHORT}\n"), Some(SHORT)),
            ("CRI-O", format!("0::/kubepods.slice/{slice}/crio-{A}.scope\n"), Some(A)),
            ("CRI-O, crun", format!("0::/kubepods.slice/{slice}/crio-{A}.scope/container\n"), Some(A)),
            ("podman", format!("0::/machine.slice/libpod-{A}.scope/container\n"), Some(A)),
            ("podman, cgroupfs", format!("0::/libpod_parent/libpod-{A}\n"), None),
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
            ("seen from a sibling's namespace", format!("0::/../../kubepods/{pod}/{A}\n"), Some(A)),
            ("CRI-O's monitor", format!("0::/kubepods.slice/{slice}/crio-conmon-{A}.scope\n"), None),
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
        ];
        for (name, text, expected) in cases {
            assert_eq!(id(&text).as_deref(), expected, "{name}: {text}");
        }
    }
}
