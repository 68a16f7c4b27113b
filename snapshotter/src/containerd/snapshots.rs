//! Snapshots, through containerd: it keeps names of its own for what snapshotters hold.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_client::services::v1::snapshots as api;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use tonic::transport::Channel;

use super::{Client, ClientError, Mount, optional, present};

/// The directory that changes below `mounts` go to, in containerd's mount namespace; `None` if they
/// are read-only.
pub fn upper_dir(mounts: &[Mount]) -> Option<PathBuf> {
    let [mount] = mounts else { return None };
    match mount.r#type.as_str() {
        "overlay" => {
            let upper = |option: &String| option.strip_prefix("upperdir=").map(PathBuf::from);
            mount.options.iter().find_map(upper)
        }
        // A parentless snapshot is its own upper directory.
        "bind" => {
            let read_only = mount.options.iter().any(|option| option == "ro");
            (!read_only).then(|| PathBuf::from(&mount.source))
        }
        _ => None,
    }
}

fn snapshot_of(snapshotter: &str, key: &str) -> String {
    format!("snapshot {key:?} of {snapshotter}")
}

impl Client {
    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    /// Makes an active snapshot of the committed `parent` (an image's chain ID), or of nothing.
    ///
    /// Errors: [`ClientError::AlreadyExists`]; [`ClientError::NotFound`] without the parent.
    pub async fn prepare(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
        parent: Option<&str>,
    ) -> Result<Vec<Mount>, ClientError> {
        self.prepare_labelled(namespace, snapshotter, key, parent, HashMap::new()).await
    }

    /// [`Self::prepare`], with labels.
    pub async fn prepare_labelled(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
        parent: Option<&str>,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, ClientError> {
        let message = api::PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.unwrap_or_default().to_owned(),
            labels,
        };
        let answer = self.snapshots().prepare(self.work_request(namespace, message)?).await;
        let object = || match parent {
            Some(parent) => format!("{} on {parent}", snapshot_of(snapshotter, key)),
            None => snapshot_of(snapshotter, key),
        };
        let answer = answer.map_err(|status| self.failed("prepare", object(), &status))?;
        Ok(answer.into_inner().mounts)
    }

    /// What to mount to see a view or an active snapshot. Errors: [`ClientError::NotFound`].
    pub async fn mounts(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<Vec<Mount>, ClientError> {
        let message =
            api::MountsRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.snapshots().mounts(self.request(namespace, message)?).await;
        let object = || snapshot_of(snapshotter, key);
        let answer = answer.map_err(|status| self.failed("get mounts of", object(), &status))?;
        Ok(answer.into_inner().mounts)
    }

    async fn stat_snapshot(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<api::Info, ClientError> {
        let message =
            api::StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.snapshots().stat(self.request(namespace, message)?).await;
        let object = || snapshot_of(snapshotter, key);
        let answer = answer.map_err(|status| self.failed("look up", object(), &status))?;
        present(answer.into_inner().info, object)
    }

    /// Name of the committed snapshot that `key` is made on; `None` if on none.
    ///
    /// Errors: [`ClientError::NotFound`].
    pub async fn snapshot_parent(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<Option<String>, ClientError> {
        let info = self.stat_snapshot(namespace, snapshotter, key).await?;
        Ok(Some(info.parent).filter(|parent| !parent.is_empty()))
    }

    /// Labels of a snapshot; `None` if there is no such snapshot.
    pub async fn snapshot_labels(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<Option<HashMap<String, String>>, ClientError> {
        let info = optional(self.stat_snapshot(namespace, snapshotter, key).await)?;
        Ok(info.map(|info| info.labels))
    }

    /// Whether there is a snapshot of that key or name.
    pub async fn has_snapshot(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<bool, ClientError> {
        Ok(optional(self.stat_snapshot(namespace, snapshotter, key).await)?.is_some())
    }

    pub(super) async fn commit_labelled(
        &self,
        namespace: &str,
        snapshotter: &str,
        (name, key): (&str, &str),
        labels: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let message = api::CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
        };
        let answer = self.snapshots().commit(self.work_request(namespace, message)?).await;
        let object = || snapshot_of(snapshotter, name);
        answer.map(drop).map_err(|status| self.failed("commit", object(), &status))
    }

    /// Errors: [`ClientError::NotFound`]; containerd's own "failed precondition" if it has
    /// children.
    pub async fn remove_snapshot(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<(), ClientError> {
        let message =
            api::RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.snapshots().remove(self.work_request(namespace, message)?).await;
        let object = || snapshot_of(snapshotter, key);
        answer.map(drop).map_err(|status| self.failed("remove", object(), &status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api;
    use crate::snapshots::Snapshotter;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::sync::Arc;
    use tokio::sync::oneshot;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let (r#type, source) = (kind.to_owned(), source.to_owned());
        Mount { r#type, source, target: String::new(), options }
    }

    #[test]
    fn changes_go_to_the_upper_directory_or_the_bound_one() {
        let overlay = mount("overlay", "overlay", &["workdir=/w", "upperdir=/u", "lowerdir=/a:/b"]);
        assert_eq!(upper_dir(&[overlay]), Some(PathBuf::from("/u")));
        let view = mount("overlay", "overlay", &["lowerdir=/a:/b"]);
        assert_eq!(upper_dir(std::slice::from_ref(&view)), None);
        assert_eq!(upper_dir(&[mount("bind", "/s", &["rw", "rbind"])]), Some(PathBuf::from("/s")));
        assert_eq!(upper_dir(&[mount("bind", "/s", &["ro", "rbind"])]), None);
        assert_eq!(upper_dir(&[]), None);
        assert_eq!(upper_dir(&[view.clone(), view]), None);
    }

    /// Serves the state below `dir` until told to stop.
    fn serve(dir: &Path) -> (oneshot::Sender<()>, impl Future<Output = std::io::Result<()>>) {
        let snapshots = Arc::new(Snapshotter::open(&dir.join("state")).unwrap());
        let socket = dir.join("socket");
        let _ = std::fs::remove_file(&socket);
        let (stop, stopped) = oneshot::channel();
        let stopped = async move { drop(stopped.await) };
        let listener = UnixListener::bind(socket).unwrap();
        (stop, api::snapshots::serve(listener, snapshots, None, stopped).unwrap())
    }

    /// Method: containerd speaks the same service to us as we to containerd, so our own snapshotter
    /// stands in for it, over a real socket.
    #[tokio::test]
    async fn client_and_snapshotter_understand_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let client = Client::connect(&dir.path().join("socket"));
        let away = client.mounts("default", "godwit", "x").await.unwrap_err();
        assert!(matches!(away, ClientError::Unavailable { .. }), "{away}");

        let (stop, server) = serve(dir.path());
        let mounts = client.prepare("default", "godwit", "x", None).await.unwrap();
        assert_eq!(upper_dir(&mounts), Some(dir.path().join("state/fs/1/fs")));
        let twice = client.prepare("default", "godwit", "x", None).await.unwrap_err();
        assert!(matches!(twice, ClientError::AlreadyExists(_)), "{twice}");
        let orphan = client.prepare("default", "godwit", "y", Some("none")).await.unwrap_err();
        assert!(matches!(orphan, ClientError::NotFound(_)), "{orphan}");
        client.commit_labelled("default", "godwit", ("a", "x"), HashMap::new()).await.unwrap();
        assert!(client.has_snapshot("default", "godwit", "a").await.unwrap());
        assert!(!client.has_snapshot("default", "godwit", "x").await.unwrap());
        client.prepare("default", "godwit", "y", Some("a")).await.unwrap();
        let parent = client.snapshot_parent("default", "godwit", "y").await.unwrap();
        assert_eq!(parent.as_deref(), Some("a"));
        assert_eq!(client.snapshot_parent("default", "godwit", "a").await.unwrap(), None);
        let parent = client.remove_snapshot("default", "godwit", "a").await.unwrap_err();
        assert_eq!(
            parent.to_string(),
            "containerd failed to remove snapshot \"a\" of godwit: cannot remove snapshot with child: \
             \"a\" is the parent of another (FailedPrecondition)"
        );

        drop(stop);
        server.await.unwrap();
        let (_stop, _server) = serve(dir.path());
        client.remove_snapshot("default", "godwit", "y").await.unwrap();
        client.remove_snapshot("default", "godwit", "a").await.unwrap();
    }
}
