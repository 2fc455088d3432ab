from setuptools import setup
from torch.utils.cpp_extension import CppExtension, BuildExtension, include_paths
import glob
setup(ext_modules=[CppExtension("zipfls_cuda._C", ["csrc/bindings.cpp"]+sorted(glob.glob("csrc/cpu/*.cpp")), extra_compile_args=["-isystem"+d for d in include_paths()]+["-O3","-Wall","-Wextra","-ffp-contract=fast"])], cmdclass={"build_ext":BuildExtension})
