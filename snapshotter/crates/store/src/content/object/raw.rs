//! How digests are written in objects: as bytes, not as text.

/// A digest as 32 raw bytes.
pub(super) mod digest {
    use godwit_protos::Digest;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(digest: &Digest, to: S) -> Result<S::Ok, S::Error> {
        digest.as_bytes().serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Digest, D::Error> {
        <[u8; 32]>::deserialize(from).map(Digest::from_bytes)
    }
}

/// A digest that may be absent.
pub(super) mod optional_digest {
    use godwit_protos::Digest;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(one: &Option<Digest>, to: S) -> Result<S::Ok, S::Error> {
        one.map(|digest| *digest.as_bytes()).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Digest>, D::Error> {
        Ok(Option::<[u8; 32]>::deserialize(from)?.map(Digest::from_bytes))
    }
}

/// Digests side by side in one byte string.
pub(super) mod digests {
    use godwit_protos::Digest;
    use serde::de::Error as _;
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(all: &[Digest], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(&all.iter().flat_map(|one| *one.as_bytes()).collect::<Vec<u8>>())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Digest>, D::Error> {
        let bytes: Vec<u8> = serde_bytes::deserialize(from)?;
        let (digests, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(D::Error::custom("digests have 32 bytes each"));
        }
        Ok(digests.iter().map(|one| Digest::from_bytes(*one)).collect())
    }
}
