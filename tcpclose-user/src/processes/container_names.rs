//! The names of a container and of its Kubernetes pod, from the files that container runtimes keep of it.
//!
//! These files belong to root of the host. They are looked for where tcpclose runs, which may be a container
//! into which they are mounted, and in the file system of the host's first process.

use std::{
    collections::HashMap,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, de::DeserializeOwned};

use super::{beneath, container};
use crate::{event::Pod, kernel::privilege};

/// How many containers are remembered. When there are more, all are forgotten and looked up again.
const MAX_CONTAINERS: usize = 1_024;

/// The length of a file that is read, in bytes; a longer one says nothing. Those of runtimes have some 10,000,
/// and the list of all containers 600 for each.
const MAX_FILE: u64 = 4 << 20;

/// The length of a name that is taken, in bytes. Those of Kubernetes have 253 at most.
const MAX_NAME: usize = 2_048;

/// Where containerd keeps what it was told of its running containers, for its namespaces:
/// `…/NAMESPACE/ID/config.json`. Of containerd itself, of k3s and RKE2, of k0s, and of `MicroK8s`.
///
/// <https://github.com/containerd/containerd/blob/v2.0.0/core/runtime/v2/bundle.go>
const CONTAINERD: [&str; 4] = [
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/k3s/containerd/io.containerd.runtime.v2.task",
    "/run/k0s/containerd/io.containerd.runtime.v2.task",
    "/var/snap/microk8s/common/run/containerd/io.containerd.runtime.v2.task",
];

/// Those of the CRI plugin and of nerdctl. Docker keeps its own files.
const CONTAINERD_NAMESPACES: [&str; 2] = ["k8s.io", "default"];

/// Where CRI-O and Podman keep it: `…/ID/userdata/config.json`.
///
/// <https://github.com/cri-o/cri-o/blob/v1.30.0/server/container_create_linux.go>
const STORAGE: [&str; 2] =
    ["/var/lib/containers/storage/overlay-containers", "/run/containers/storage/overlay-containers"];

/// Docker's: `…/ID/config.v2.json`.
const DOCKER: &str = "/var/lib/docker/containers";

/// The names of a container; `None` where no runtime's file has them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RuntimeNames {
    /// The container's own.
    pub container: Option<String>,
    /// That of its pod.
    pub pod: Option<Pod>,
}

/// The names of containers by their ids.
#[derive(Debug, Default)]
pub struct ContainerNames {
    known: HashMap<String, Arc<RuntimeNames>>,
    /// The directories below which the files may be.
    roots: Vec<PathBuf>,
}

impl ContainerNames {
    /// Makes an empty collection.
    pub fn new() -> Self {
        // In another pid namespace, the first process is one of a container, whose files may say anything.
        let of_host = privilege::in_initial_pid_namespace().then_some("/proc/1/root");
        let roots = [Some("/"), of_host].into_iter().flatten().map(PathBuf::from).collect();
        Self { known: HashMap::new(), roots }
    }

    /// The names of the container with this id. They are looked up once: runtimes write their files before
    /// they start a container.
    pub fn of(&mut self, id: &str) -> Arc<RuntimeNames> {
        if let Some(names) = self.known.get(id) {
            return names.clone();
        }
        if self.known.len() >= MAX_CONTAINERS {
            self.known.clear();
        }
        let found = self.roots.iter().find_map(|root| look_up(root, id));
        let names = Arc::new(found.unwrap_or_default());
        self.known.insert(id.to_owned(), names.clone());
        names
    }
}

/// What the runtimes' files below `root` say of a container.
fn look_up(root: &Path, id: &str) -> Option<RuntimeNames> {
    // Those of LXC and systemd-nspawn are names, which must not become parts of a path.
    if !container::is_id(id) {
        return None;
    }
    let bundles = CONTAINERD.iter().flat_map(|root| {
        CONTAINERD_NAMESPACES.map(|namespace| format!("{root}/{namespace}/{id}/config.json"))
    });
    let in_storage = STORAGE.map(|root| format!("{root}/{id}/userdata/config.json"));
    for path in bundles.chain(in_storage) {
        if let Some(Bundle { annotations }) = read(root, &path) {
            let mut names = in_bundle(&annotations);
            names.container = names.container.or_else(|| stored_name(root, id));
            return Some(names);
        }
    }
    let docker: DockerContainer = read(root, &format!("{DOCKER}/{id}/config.v2.json"))?;
    let mut names = in_labels(&docker.config.labels);
    names.container = names.container.or_else(|| checked(docker.name?.trim_start_matches('/')));
    Some(names)
}

type Texts = HashMap<String, String>;

/// The configuration of an OCI runtime, as far as it says what is needed.
#[derive(Deserialize)]
struct Bundle {
    #[serde(default)]
    annotations: Texts,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerContainer {
    name: Option<String>,
    config: DockerConfiguration,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerConfiguration {
    #[serde(default, deserialize_with = "or_default")]
    labels: Texts,
}

/// A container in the list that CRI-O's and Podman's storage keeps.
#[derive(Deserialize)]
struct StoredContainer {
    id: String,
    #[serde(default)]
    names: Vec<String>,
}

/// Go writes an empty map as null.
fn or_default<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Texts, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The names in the annotations of a container.
fn in_bundle(annotations: &Texts) -> RuntimeNames {
    let text = |key: &str| checked(annotations.get(key)?);
    // The CRI plugin of containerd:
    // <https://github.com/containerd/containerd/blob/v2.0.0/internal/cri/annotations/annotations.go>
    let [name, namespace, container] = ["sandbox-name", "sandbox-namespace", "container-name"]
        .map(|it| text(&format!("io.kubernetes.cri.{it}")));
    if let (Some(name), Some(namespace)) = (name, namespace) {
        return RuntimeNames { container, pod: Some(Pod { name, namespace }) };
    }
    let mut names = in_labels(annotations);
    // CRI-O repeats the labels of the kubelet as one annotation; older versions have them there only.
    if names.pod.is_none()
        && let Some(labels) = annotations.get("io.kubernetes.cri-o.Labels")
        && let Ok(labels) = serde_json::from_str::<Texts>(labels)
    {
        names = in_labels(&labels);
    }
    names.container = names.container.or_else(|| text("nerdctl/name"));
    names
}

/// The names in the labels that the kubelet gives to a container.
///
/// <https://github.com/kubernetes/kubernetes/blob/v1.31.0/staging/src/k8s.io/kubelet/pkg/types/labels.go>
fn in_labels(labels: &Texts) -> RuntimeNames {
    let text = |key: &str| checked(labels.get(key)?);
    let pod = || {
        let (name, namespace) = (text("io.kubernetes.pod.name")?, text("io.kubernetes.pod.namespace")?);
        Some(Pod { name, namespace })
    };
    RuntimeNames { container: text("io.kubernetes.container.name"), pod: pod() }
}

/// The name that CRI-O's and Podman's storage has for a container.
fn stored_name(root: &Path, id: &str) -> Option<String> {
    let list: Vec<StoredContainer> = read(root, &format!("{}/containers.json", STORAGE[0]))?;
    checked(list.into_iter().find(|container| container.id == id)?.names.first()?)
}

fn checked(name: &str) -> Option<String> {
    (!name.is_empty() && name.len() <= MAX_NAME).then(|| name.to_owned())
}

/// Reads a file below `root`.
fn read<T: DeserializeOwned>(root: &Path, path: &str) -> Option<T> {
    let file = beneath::read(&beneath::open_in(root, Path::new(path)).ok()?).ok()?;
    if file.metadata().ok()?.len() > MAX_FILE {
        return None;
    }
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;

    const ID: &str = "3f4ac1b2d5e6f70819283746556473829100aabbccddeeff0011223344556677";

    /// A host with this file of a runtime, where `ID` stands for the id.
    fn host(path: &str, content: &Value) -> TempDir {
        let host = tempfile::tempdir().unwrap();
        put(&host, path, &content.to_string());
        host
    }

    fn put(host: &TempDir, path: &str, content: &str) {
        let file = host.path().join(path.replace("ID", ID));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    fn found(host: &TempDir) -> RuntimeNames {
        look_up(host.path(), ID).unwrap_or_default()
    }

    fn names(container: &str, pod: Option<(&str, &str)>) -> RuntimeNames {
        let pod = pod.map(|(name, namespace)| Pod { name: name.into(), namespace: namespace.into() });
        RuntimeNames { container: Some(container.into()), pod }
    }

    fn bundle(annotations: &Value) -> Value {
        json!({"ociVersion": "1.1.0", "process": {"args": ["sleep"]}, "annotations": annotations})
    }

    #[test]
    fn each_runtime_names_its_containers() {
        let shop = Some(("web-1", "shop"));
        let cri = bundle(&json!({
            "io.kubernetes.cri.container-name": "app",
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-name": "web-1",
            "io.kubernetes.cri.sandbox-namespace": "shop",
        }));
        for root in CONTAINERD {
            let host = host(&format!("{}/k8s.io/ID/config.json", &root[1..]), &cri);
            assert_eq!(found(&host), names("app", shop), "{root}");
        }
        let path = "run/containerd/io.containerd.runtime.v2.task/default/ID/config.json";
        let nerdctl = host(path, &bundle(&json!({"nerdctl/name": "web", "nerdctl/namespace": "default"})));
        assert_eq!(found(&nerdctl), names("web", None));

        let kubelet = json!({
            "io.kubernetes.container.name": "app",
            "io.kubernetes.pod.name": "web-1",
            "io.kubernetes.pod.namespace": "shop",
        });
        let path = "run/containers/storage/overlay-containers/ID/userdata/config.json";
        assert_eq!(found(&host(path, &bundle(&kubelet))), names("app", shop), "CRI-O");
        let labels = json!({"io.kubernetes.cri-o.Labels": kubelet.to_string()});
        assert_eq!(found(&host(path, &bundle(&labels))), names("app", shop), "CRI-O, labels");

        let podman = host(
            "var/lib/containers/storage/overlay-containers/ID/userdata/config.json",
            &bundle(&json!({"io.container.manager": "libpod"})),
        );
        assert_eq!(found(&podman), RuntimeNames::default());
        let list = json!([{"id": "another", "names": ["other"]}, {"id": ID, "names": ["web"], "layer": "x"}]);
        put(&podman, "var/lib/containers/storage/overlay-containers/containers.json", &list.to_string());
        assert_eq!(found(&podman), names("web", None));

        let path = "var/lib/docker/containers/ID/config.v2.json";
        let docker = |labels: &Value| host(path, &json!({"Name": "/web", "Config": {"Labels": labels}}));
        assert_eq!(found(&docker(&kubelet)), names("app", shop));
        assert_eq!(found(&docker(&json!({}))), names("web", None));
        assert_eq!(found(&docker(&Value::Null)), names("web", None));
    }

    #[test]
    fn what_cannot_be_trusted_says_nothing() {
        let path = "run/containerd/io.containerd.runtime.v2.task/k8s.io/ID/config.json";
        let good = bundle(&json!({
            "io.kubernetes.cri.sandbox-name": "web-1", "io.kubernetes.cri.sandbox-namespace": "shop",
        }));
        assert!(found(&host(path, &good)).pod.is_some());

        let link = tempfile::tempdir().unwrap();
        put(&link, "elsewhere", &good.to_string());
        let file = link.path().join(path.replace("ID", ID));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        symlink(link.path().join("elsewhere"), &file).unwrap();
        assert_eq!(found(&link), RuntimeNames::default(), "a link");

        let long = host(path, &good);
        put(&long, path, &format!("{}{good}", " ".repeat(usize::try_from(MAX_FILE).unwrap())));
        assert_eq!(found(&long), RuntimeNames::default(), "a long file");

        let half = bundle(&json!({"io.kubernetes.cri.sandbox-name": "web-1"}));
        assert_eq!(found(&host(path, &half)), RuntimeNames::default(), "a pod without a namespace");
        for broken in [json!([]), json!({"annotations": 1}), json!({"annotations": {"a": 1}})] {
            assert_eq!(found(&host(path, &broken)), RuntimeNames::default(), "{broken}");
        }
        for id in ["..", "web", "", "../../k8s.io"] {
            assert_eq!(look_up(host(path, &good).path(), id), None, "{id}");
        }
    }

    #[test]
    fn a_container_is_looked_up_once() {
        let path = "run/containerd/io.containerd.runtime.v2.task/k8s.io/ID/config.json";
        let host = host(path, &bundle(&json!({"io.kubernetes.cri.container-name": "app"})));
        let mut all = ContainerNames { roots: vec![host.path().to_owned()], ..ContainerNames::default() };
        let first = all.of(ID);
        assert!(Arc::ptr_eq(&first, &all.of(ID)));
        for number in 0..2 * MAX_CONTAINERS {
            all.of(&format!("{number:064x}"));
            assert!(all.known.len() <= MAX_CONTAINERS);
        }
        assert_eq!(ContainerNames::default().of(ID), Arc::default(), "no place is known");
    }
}
